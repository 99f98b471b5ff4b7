// Looks at a run's page from within: contrast of every text as WCAG 2 counts it, alternatives, the timeline's keys.
const luminance = colour => {
  const [r, g, b] = colour.match(/[\d.]+/g).slice(0, 3).map(part => part / 255)
    .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const backdrop = element => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)" && colour !== "transparent") return colour;
  }
  return "rgb(255, 255, 255)";
};
let worst = 21;
for (const element of document.body.querySelectorAll("*")) {
  const speaks = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!speaks || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const [light, dark] = [getComputedStyle(element).color, backdrop(element)].map(luminance).sort((a, b) => b - a);
  worst = Math.min(worst, (light + .05) / (dark + .05));
}
const canvas = document.querySelector("canvas"), whole = [canvas.dataset.from, canvas.dataset.to].map(Number);
const now = () => [canvas.dataset.from, canvas.dataset.to].map(Number);
const key = name => canvas.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
canvas.focus(); key("+"); key("+"); const zoomed = now();
key("ArrowRight"); const moved = now();
key("0"); const back = now();
document.querySelector("button[data-key='+']").click(); const clicked = now();
const found = {
  worst, whole, zoomed, moved, back, clicked, focused: document.activeElement === canvas,
  pictures: [...document.images].map(image => [image.alt, image.naturalWidth]),
  nameless: [...document.querySelectorAll("canvas, button, a")]
    .filter(each => !(each.ariaLabel || each.textContent)).length,
  across: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  width: document.documentElement.clientWidth,
};
const said = document.createElement("pre"); said.id = "found"; said.textContent = JSON.stringify(found);
document.body.append(said);
