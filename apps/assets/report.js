"use strict";
// Draws each figure where its placeholder stands. `views` holds the Vega views by name, for whoever opens the console.
const views = {};
const options = {
  renderer: "svg",
  mode: "vega-lite",
  actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
  i18n: { SVG_ACTION: "Save as SVG", PNG_ACTION: "Save as PNG" },
  scaleFactor: { png: 2 },
};
async function draw(place) {
  const name = place.dataset.figure;
  const spec = JSON.parse(document.getElementById(`spec-${name}`).textContent);
  try {
    views[name] = (await vegaEmbed(place, spec, { ...options, downloadFileName: name })).view;
  } catch (error) {
    place.textContent = `This figure could not be drawn: ${error.message}`;
    throw error;
  }
}
Promise.all([...document.querySelectorAll("[data-figure]")].map(draw)).then(() => {
  document.body.dataset.drawn = "yes";
});
