// What the page does by itself: say a new state once to screen readers, and say when the server has gone.
const opened = {};  // whether a part that is renewed every second was unfolded
document.addEventListener("click", (event) => {
  const part = event.target.closest("summary")?.parentElement;
  if (part?.id) opened[part.id] = !part.open;
});
document.addEventListener("htmx:afterSwap", () => {
  for (const [id, open] of Object.entries(opened)) document.getElementById(id)?.toggleAttribute("open", open);
  const status = document.getElementById("status"), said = document.querySelector("[data-status]");
  if (said && status.textContent !== said.dataset.status) status.textContent = said.dataset.status;
  document.getElementById("offline").hidden = true;
  for (const found of document.querySelectorAll("[data-default-of]"))  // what the plan found out for an empty field
    document.getElementById(found.dataset.defaultOf)?.setAttribute("placeholder", found.dataset.default);
});
for (const failed of ["htmx:sendError", "htmx:responseError"])
  document.addEventListener(failed, () => { document.getElementById("offline").hidden = false; });
for (const input of document.querySelectorAll("[data-send]"))  // a chosen file is sent at once: its button is for browsers without scripts
  document.getElementById(input.dataset.send).hidden = true;
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("textarea"))
    event.target.form.requestSubmit();
});
document.addEventListener("change", (event) => {
  if (event.target.matches("[data-send]") && event.target.files.length)
    event.target.form.requestSubmit(document.getElementById(event.target.dataset.send));
});
