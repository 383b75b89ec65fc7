// Renders templates as Ollama does: Go's text/template on the messages, neighbours of one role joined, and two functions.
// Reads a JSON list of jobs from standard input, writes a JSON list of results.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role, Content, Thinking string
	ToolCalls               []any
}

type job struct {
	Template string
	Today    string
	Messages []message
	Data     map[string]any // instead of messages
}

type result struct{ Text, Error string }

func data(j job) map[string]any {
	if j.Messages == nil {
		return j.Data
	}
	var system []string
	var joined []*message
	for i := range j.Messages {
		m := &j.Messages[i]
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(joined); n > 0 && joined[n-1].Role == m.Role {
			joined[n-1].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, m)
		}
	}
	return map[string]any{
		"System": strings.Join(system, "\n\n"), "Messages": joined, "Tools": nil, "Response": "", "Think": false,
	}
}

func render(j job) result {
	funcs := template.FuncMap{
		"json": func(v any) string {
			b, _ := json.Marshal(v)
			return string(b)
		},
		"currentDate": func(args ...string) string { return j.Today },
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(funcs).Parse(j.Template)
	if err != nil {
		return result{Error: err.Error()}
	}
	var text strings.Builder
	if err := parsed.Execute(&text, data(j)); err != nil {
		return result{Error: err.Error()}
	}
	return result{Text: text.String()}
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	results := make([]result, len(jobs))
	for i, j := range jobs {
		results[i] = render(j)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(results); err != nil {
		panic(err)
	}
}
