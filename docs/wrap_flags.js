// A command in a table is broken between its words, never after the hyphens of a flag.
for (const code of document.querySelectorAll("td code")) {
  if (!code.textContent.includes(" ")) continue;
  const words = code.textContent.split(" ").map((word) => {
    const span = document.createElement("span");
    span.style.whiteSpace = "nowrap";
    span.textContent = word;
    return span;
  });
  code.replaceChildren(...words.flatMap((span, i) => (i ? [" ", span] : [span])));
}
