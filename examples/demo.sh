#!/usr/bin/env bash
# The main job on real input: tune SmolLM2-135M on The Devil's Dictionary, measure it, let both speak.
# `make demo` runs this. A run that is there already is shown, not trained again; one that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=examples/devils-dictionary.yaml
run=${RUN:-runs/devils-dictionary}
# Words of our day: neither in the rows trained on nor anywhere in Bierce's dictionary.
words=(deadline influencer algorithm)

if [ -f "$run/result.json" ]; then
    echo "$run is trained already; \`rm -r $run\` to train it again"
elif [ -d "$run" ]; then
    slimtune train "$run/recipe.yaml" --out "$run" --resume
else
    slimtune train "$recipe" --out "$run"
fi

echo; slimtune eval "$run"
for word in "${words[@]}"; do
    echo; slimtune generate "$run" "Define \"$word\"." --side-by-side --max-new-tokens 60
done
echo
python - "$run" <<'PY'
import json, sys
from pathlib import Path
result = json.loads(Path(sys.argv[1], "result.json").read_text())
print(f"adapter: {result['adapter']} ({result['adapter_bytes'] / 1e6:.1f} MB, "
      f"{100 * result['trainable_params'] / result['total_params']:.2f} % of the parameters)")
print(f"report:  {result['run']}/report.html")
PY
