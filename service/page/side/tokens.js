// An answer's tokens, each with how much likelier it is than under the base: where does an adapter speak?
import { html } from "../html.js";

const LEVELS = [0.25, 1, 3];
const MOST = 3;

/** −3 … 3: how far a difference of log-probabilities is from none. */
function levelOf(difference) {
  const size = LEVELS.filter((limit) => Math.abs(difference) >= limit).length;
  return difference < 0 ? -size : size;
}

const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(2)}`;
const visible = (text) => text.replace(/\n/g, "⏎").replace(/^ /, "␣");

export function Legend() {
  return html`<p class="faint tokens" aria-hidden="true">
    Against the base:
    <span class="less3">${" much less likely "}</span><span class="less1">${" less "}</span><span>${" as likely "}</span>
    <span class="more1">${" more "}</span><span class="more3">${" much more likely "}</span>
  </p>`;
}

export function Tokens({ tokens, scores, text: whole }) {
  const rows = tokens.map(({ text, logprob }, index) => ({ text, logprob, base: scores[index], by: logprob - scores[index] }));
  const strongest = rows.filter(({ by }) => levelOf(by) > 0).sort((a, b) => b.by - a.by).slice(0, MOST);
  const total = rows.reduce((sum, { by }) => sum + by, 0);
  const words = strongest.map(({ text, by }) => `“${visible(text)}” (${signed(by)})`).join(", ");
  return html`<p class="answer tokens">
      ${rows.map(({ text, by }, index) => {
        const level = levelOf(by);
        const name = level ? `${level < 0 ? "less" : "more"}${Math.abs(level)}` : "";
        const isSaid = index < rows.length - 1 || whole.endsWith(text); // the last may only end the answer
        return html`<span key=${index} class=${name} title=${signed(by)}>${isSaid ? text : " ■"}</span>`;
      })}
    </p>
    <p class="faint">
      ${words ? `It speaks most at ${words}.` : "It says what the base would say."} The answer as a whole: ${signed(total)} in
      log-probability against the base.
    </p>
    <details>
      <summary>Tokens as a table</summary>
      <div class="scroll" tabindex="0" role="region" aria-label="Tokens as a table">
        <table>
          <thead><tr><th scope="col">Token</th><th scope="col">Here</th><th scope="col">Base</th><th scope="col">Difference</th></tr></thead>
          <tbody>${rows.map(({ text, logprob, base, by }, index) => html`<tr key=${index}>
            <td><code>${visible(text)}</code></td><td>${signed(logprob)}</td><td>${signed(base)}</td><td>${signed(by)}</td>
          </tr>`)}</tbody>
        </table>
      </div>
    </details>`;
}
