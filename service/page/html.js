// Markup as tagged templates: html`<p class=${name}>…</p>`.
import htm from "htm";
import { h } from "preact";

export const html = htm.bind(h);
