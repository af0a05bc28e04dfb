"use strict";
// Without this script every link below leads to its image all the same, through :target.
const show = (id) => {
  for (const open of document.querySelectorAll("dialog[open]")) open.close();
  document.getElementById(id).showModal();
};
let origin = null;
for (const link of document.querySelectorAll("[data-zoom]")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    if (!link.closest("dialog")) origin = link;
    show(link.dataset.zoom);
  });
}
for (const link of document.querySelectorAll("a.cell")) {
  link.setAttribute("role", "button");
  link.setAttribute("aria-haspopup", "dialog");
  link.addEventListener("keydown", (event) => {
    if (event.key === " ") { event.preventDefault(); link.click(); }
  });
}
for (const dialog of document.querySelectorAll("dialog.zoom")) {
  const back = () => { dialog.close(); if (origin) origin.focus(); };
  const close = dialog.querySelector("[data-close]");
  close.setAttribute("role", "button");
  close.addEventListener("click", (event) => { event.preventDefault(); back(); });
  dialog.addEventListener("cancel", (event) => { event.preventDefault(); back(); });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) back(); });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    if (step) dialog.querySelector(`[data-step=${step}]`).click();
    if (event.key === " " && event.target.matches("a")) { event.preventDefault(); event.target.click(); }
  });
}
// Under a slider, "after" covers "before" from the right; without this script they stand side by side.
for (const slider of document.querySelectorAll("[data-slider]")) {
  const label = slider.querySelector(".cut"), input = label.querySelector("input");
  const cut = () => {
    slider.style.setProperty("--cut", `${input.value}%`);
    input.setAttribute("aria-valuetext", `${100 - input.value} % after`);
  };
  label.hidden = false;
  slider.classList.add("moving");
  input.addEventListener("input", cut);
  cut();
}
