// plotly for this page: the kernel sends it, so that no network is needed.
// @ts-check
import { make } from "./frame.js";

const PLOTLY = Symbol.for("nbengine.plotly"); // on globalThis: a promise of the library, which a page needs once
const LOADS_WITHIN = 30000; // milliseconds that the kernel may take to send it

/** The library, from the kernel: once a page, zipped.
 * @param {import("./frame.js").Model} model @param {() => void} ask @returns {Promise<any>} */
export function plotly(model, ask) {
  const all = /** @type {any} */ (globalThis);
  if (all[PLOTLY]) return all[PLOTLY];
  const loading = new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error("the kernel did not send plotly")), LOADS_WITHIN);
    const arrived = async (/** @type {any} */ message, /** @type {DataView[]} */ buffers) => {
      if (!message.plotly) return;
      model.off("msg:custom", /** @type {any} */ (arrived));
      clearTimeout(late);
      try {
        const zipped = new Blob([/** @type {any} */ (buffers[0])]).stream().pipeThrough(new DecompressionStream("gzip"));
        const text = await new Response(zipped).text();
        const key = `nbengine${Math.random().toString(36).slice(2)}`;
        // as a script of its own: it is written for one, and `define` of a page that has require.js must not catch it
        const wrapped = `globalThis["${key}"] = (function () { var module = { exports: {} }, exports = module.exports, define; ${text}
          ; return module.exports; }).call(globalThis);`;
        const url = URL.createObjectURL(new Blob([wrapped], { type: "text/javascript" }));
        const script = make("script", { src: url });
        script.onload = () => {
          URL.revokeObjectURL(url);
          const found = all[key];
          delete all[key];
          if (found?.react) resolve(found);
          else reject(new Error("plotly did not load"));
        };
        script.onerror = () => reject(new Error("this page lets no script be added"));
        document.head.append(script);
      } catch (error) {
        reject(error);
      }
    };
    model.on("msg:custom", /** @type {any} */ (arrived));
    ask();
  });
  all[PLOTLY] = loading;
  loading.catch(() => delete all[PLOTLY]);
  return loading;
}
