"""Two or three examples for the help of each command."""

EXAMPLES = {
    "plan": ("slimtune plan llama-3.1-8b --gpu rtx-4090", "slimtune plan recipe.yaml --method lora,ia3"),
    "choose": (
        "slimtune choose llama-3.1-8b --quantization nf4 --budget 1500",
        "slimtune choose recipe.yaml --hours 10 --kind laptop,mac,rent",
        "slimtune choose qwen3-30b-a3b --serve --tokens-per-second 20",
    ),
    "cost": (
        "slimtune cost llama-3.1-8b --gpu rtx-3090 --quantization nf4 --runs 20",
        "slimtune cost recipe.yaml --gpu 'm4 max 128gb' --kwh-price 0.3",
        "slimtune cost llama-3.1-8b --gpu rtx-3090 --serve",
    ),
    "models": ("slimtune models --family qwen3", "slimtune models --fits rtx-3060-12gb"),
    "gpus": ("slimtune gpus rtx-3090 rtx-4090 'm4 max 128gb'", "slimtune gpus --for llama-3.1-8b --quantization nf4"),
    "bench": ("slimtune bench", "slimtune bench --export", "slimtune bench runs/mine"),
    "benchmarks": ("slimtune benchmarks --gpu rtx-4090", "slimtune benchmarks --model qwen3.6-27b --sources"),
    "data": (
        "slimtune data rows.jsonl --model smollm2-135m",
        "slimtune data rows.csv --model smollm2-135m --html rows.html",
    ),
    "import": (
        "slimtune import llama3_lora_sft.yaml --out recipe.yaml",
        "slimtune import train.sh --from ms-swift",
    ),
    "train": (
        "slimtune train --model smollm2-135m --data rows.jsonl --out runs/first",
        "slimtune train recipe.yaml --epochs 1 --set method.dropout=0.1",
    ),
    "tune": (
        "slimtune tune recipe.yaml --over train.learning_rate=log:1e-5..1e-2",
        "slimtune tune recipe.yaml --over method.r=8,16,32 --minutes 60",
    ),
    "eval": (
        "slimtune eval runs/first --split validation",
        "slimtune eval runs/first --data held_out.jsonl --generate 4",
    ),
    "report": ("slimtune report runs/first", "slimtune report runs/first --out page.html"),
    "compare": ("slimtune compare recipe.yaml --methods lora,ia3 --seeds 2", "slimtune compare recipe.yaml --tune"),
    "generate": ("slimtune generate runs/first 'What is love?'", "slimtune generate runs/first Hello --side-by-side"),
    "chat": ("slimtune chat runs/first", "slimtune chat runs/first --system 'Be brief.' --side-by-side"),
    "predict": (
        "slimtune predict runs/spam 'You have won a prize!'",
        "slimtune predict runs/spam --data new.jsonl --out predicted.jsonl",
    ),
    "merge": ("slimtune merge runs/first --out merged", "slimtune merge runs/first --out merged --dtype float16"),
    "export": (
        "slimtune export runs/first --to ollama --out ollama",
        "slimtune export runs/first --to gguf --merged --precision q8_0 --out gguf",
    ),
    "verify": ("slimtune verify runs/first", "slimtune verify merged --data held_out.jsonl"),
    "check": (
        "slimtune check runs/first",
        "slimtune check my-adapter --base smollm2-135m",
        "slimtune check my-adapter --base smollm2-135m --at http://127.0.0.1:8000",
    ),
    "repair": (
        "slimtune repair my-adapter --for peft --out mended",
        "slimtune repair my-adapter --for llama.cpp --base smollm2-135m --out gguf",
    ),
    "push": ("slimtune push runs/first me/first --dry-run", "slimtune push runs/first me/first --private"),
    "serve": ("slimtune serve runs/first", "slimtune serve runs/first other=runs/second --engine llama.cpp"),
    "ui": ("slimtune ui", "slimtune ui ~/tuning --port 0"),
    "methods": ("slimtune methods lora", "slimtune methods --model smollm2-135m"),
    "doctor": ("slimtune doctor", "slimtune doctor --json"),
    "explain": ("slimtune explain cuda-out-of-memory", "slimtune explain - < traceback.txt"),
}
