"""Our renderer of Go templates beside Go's own: the same text, and an error wherever Go has one."""

from __future__ import annotations

import datetime

import pytest
from go_engine import DAY, rendered

from slimtune.export.go_template import GoTemplateError, render

DATA = {
    "System": "Be brief.",
    "Empty": "",
    "None": [],
    "Messages": [{"Role": "user", "Content": " ä {{ x }}\n"}, {"Role": "assistant", "Content": "嘘"}],
}
SAME = [
    "",
    "plain text, }} too, { and }\n",
    "{{ .System }}",
    "a {{- .System -}} b",
    "a\n {{- /* said */ -}} \n b",
    '{{ "x\\ty\\n\\u00e9\\"\\\\" }}{{ `raw "x" \\n` }}',
    '{{ "}}" }}{{ "{{" }}',
    "{{ len .System }} {{ len .Messages }} {{ len `ä` }}",
    "{{ slice .System 3 }}|{{ slice .System 0 2 }}|{{ slice .System 9 }}",
    "{{ index .Messages 1 | len }}",
    "{{ (index .Messages 0).Role }}",
    "{{ if .Empty }}a{{ else if .None }}b{{ else }}c{{ end }}",
    "{{ if not .Empty }}a{{ end }}{{ if and .System .Messages }}b{{ end }}",
    "{{ or .Empty .System }}{{ and .Empty .System }}",
    "{{ if or .System (slice .Empty 9) }}stops before the error{{ end }}",
    "{{ if and .Empty (index .Messages 9).Role }}{{ else }}so here{{ end }}",
    '{{ if eq .System "x" "Be brief." }}one of{{ end }}{{ if ne .Empty "" }}no{{ end }}',
    "{{ if lt 1 2 }}a{{ end }}{{ if ge 2 2 }}b{{ end }}{{ if gt 1 2 }}c{{ end }}{{ if le 3 2 }}d{{ end }}",
    "{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}",
    "{{ range $m := .Messages }}{{ $m.Role }},{{ end }}",
    "{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ if eq $i 0 }}, {{ end }}{{ end }}",
    "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if $last }}.{{ end }}{{ end }}",
    "{{ range .None }}x{{ else }}none{{ end }}",
    "{{ range 3 }}{{ . }}{{ end }}{{ range $i := 2 }}{{ $i }}{{ end }}{{ range len .Empty }}x{{ end }}",
    "{{ range 5 }}{{ if eq . 1 }}{{ continue }}{{ end }}{{ if eq . 3 }}{{ break }}{{ end }}{{ . }}{{ end }}",
    '{{ $x := "a" }}{{ if .System }}{{ $x = "b" }}{{ end }}{{ $x }}',
    '{{ $x := "a" }}{{ if .System }}{{ $x := "b" }}{{ end }}{{ $x }}',
    '{{ $b := "" }}{{ range .Messages }}{{ $b }}>{{ .Role }} {{ $b = .Role }}{{ end }}',
    "{{ $.System }}{{ range .Messages }}{{ $.System }}{{ end }}",
    "{{ if $x := .System }}{{ $x }}{{ end }}",
    "{{ .System | len }}",
    "{{ slice currentDate 0 4 }} {{ currentDate }}",
    "{{ true }}{{ false }}{{ 12 }}",
]
WRONG = [
    "{{ .System",
    "{{ end }}",
    "{{ if .System }}",
    "{{ range .System }}{{ end }}",
    "{{ range .Messages }}{{ else if .System }}{{ end }}",
    "{{ slice .System 10 }}",
    "{{ slice .System 2 1 }}",
    "{{ index .Messages 2 }}",
    "{{ $x }}",
    "{{ unknown .System }}",
    "{{ if eq 1 .System }}{{ end }}",
    "{{ range $i, $x := 3 }}{{ end }}",
    "{{ .System .Empty }}",
    "{{ (len .System }}",
    '{{ "x }}',
    '{{ "\\q" }}',
    "{{ .System.Length }}",
    '{{ slice "no system messages" 99 }}',
]


def test_the_same_text_as_gos_own_engine():
    day = datetime.date.fromisoformat(DAY)
    for template, theirs in zip(SAME, rendered([{"Template": t, "Data": DATA} for t in SAME]), strict=True):
        assert theirs["Error"] == "", template
        assert render(template, DATA, day) == theirs["Text"], template


def test_an_error_wherever_go_has_one():
    for template, theirs in zip(WRONG, rendered([{"Template": t, "Data": DATA} for t in WRONG]), strict=True):
        assert theirs["Error"], template
        with pytest.raises(GoTemplateError):
            render(template, DATA)


@pytest.mark.parametrize(
    "template", ["{{ with .System }}x{{ end }}", "{{ printf `%s` .System }}", '{{ template "x" }}']
)
def test_what_lies_outside_the_part_is_refused(template):
    with pytest.raises(GoTemplateError):
        render(template, DATA)
