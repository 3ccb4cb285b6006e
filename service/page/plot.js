// Plots of shares as SVG: axes from 0 to 1, and points that a keyboard reaches.
import { useState } from "preact/hooks";
import { html } from "./html.js";

export const WIDTH = 640;
export const HEIGHT = 420;
const MARGIN = { left: 80, right: 28, top: 14, bottom: 48 };
const TICKS = [0, 0.25, 0.5, 0.75, 1];

/** The place on the picture of `value` between `low` and `high`. */
export function scaleX(value, low = 0, high = 1) {
  return MARGIN.left + ((value - low) / (high - low || 1)) * (WIDTH - MARGIN.left - MARGIN.right);
}

export function scaleY(share) {
  return HEIGHT - MARGIN.bottom - share * (HEIGHT - MARGIN.top - MARGIN.bottom);
}

/** Axes with their names; `ticks` of the horizontal one are [value, text]. */
export function Axes({ x, y, low = 0, high = 1, ticks = TICKS.map((tick) => [tick, `${100 * tick} %`]) }) {
  const [bottom, left] = [scaleY(0), scaleX(low, low, high)];
  return html`<g class="axes" aria-hidden="true">
    ${TICKS.map((tick) => {
      const at = scaleY(tick);
      return html`<line x1=${left} x2=${WIDTH - MARGIN.right} y1=${at} y2=${at} />
        <text x=${left - 8} y=${at + 4} text-anchor="end">${100 * tick} %</text>`;
    })}
    ${ticks.map(([tick, text]) => {
      const at = scaleX(tick, low, high);
      return html`<line x1=${at} x2=${at} y1=${scaleY(1)} y2=${bottom} />
        <text x=${at} y=${bottom + 18} text-anchor="middle">${text}</text>`;
    })}
    <text x=${(left + WIDTH) / 2} y=${HEIGHT - 8} text-anchor="middle">${x}</text>
    <text transform=${`translate(14 ${scaleY(0.5)}) rotate(-90)`} text-anchor="middle">${y}</text>
  </g>`;
}

/** A picture with points to choose. One of them is in the tab order; arrow keys go on to the others, in their order.
 *
 * Each of `points` has `id`, `label`, where it is (`x`, `y` on the picture), and `draw`, its marks. `choose` gets the id
 * of one that is clicked, or on which Enter or Space is pressed; `look` of one that the pointer or the focus is on.
 */
export function Picture({ label, points, choose, look, children }) {
  const [at, setAt] = useState(0);
  const current = Math.min(at, points.length - 1);
  const onKey = (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? points.length - 1 : step && current + step;
    if (next !== undefined && points[next]) {
      event.preventDefault();
      event.currentTarget.querySelectorAll("[role=button]")[next].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(points[current].id);
    }
  };
  return html`<svg class="plot" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="group" aria-label=${label} onKeyDown=${onKey}>
    ${children}
    ${points.map(
      (point, index) => html`<g
        key=${point.id}
        role="button"
        aria-label=${point.label}
        tabindex=${index === current ? 0 : -1}
        class=${point.kind}
        onClick=${() => choose(point.id)}
        onFocus=${() => {
          setAt(index);
          look(point.id);
        }}
        onPointerEnter=${() => look(point.id)}
      >
        <circle class="reach" cx=${point.x} cy=${point.y} r="14" />
        ${point.draw}
      </g>`,
    )}
  </svg>`;
}
