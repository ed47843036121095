"use strict";
const root = document.documentElement;
function show(language) {
  root.lang = language;
  for (const button of document.querySelectorAll("[data-to]")) {
    button.setAttribute("aria-pressed", String(button.dataset.to === language));
  }
}
for (const button of document.querySelectorAll("[data-to]")) {
  button.addEventListener("click", () => show(button.dataset.to));
}
for (const hidden of document.querySelectorAll(".switch[hidden], label[hidden]")) hidden.hidden = false;
show(root.lang);

for (const input of document.querySelectorAll("input[type=search]")) {
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const item of input.closest("details").querySelectorAll(".item")) {
      item.hidden = !item.textContent.toLowerCase().includes(wanted);
    }
  });
}

let closed = [];
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const entry of closed) entry.open = true;
});
window.addEventListener("afterprint", () => {
  for (const entry of closed) entry.open = false;
});
