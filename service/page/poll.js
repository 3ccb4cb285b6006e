// Asking again and again, gently: while the tab is seen, one request at a time, slower after a failure.
import { useEffect } from "preact/hooks";

const SLOWER = 4;

/** Call `read` now and every `period` ms as long as the component is there and the tab is seen; it must not throw, and
 * returns whether it has succeeded.
 */
export function usePoll(read, period) {
  useEffect(() => {
    let timer = null;
    let ended = false;
    const turn = async () => {
      timer = null;
      const ok = await read();
      if (!ended && !document.hidden) timer = setTimeout(turn, ok ? period : SLOWER * period);
    };
    const onSight = () => {
      clearTimeout(timer);
      timer = null;
      if (!document.hidden) turn();
    };
    turn();
    document.addEventListener("visibilitychange", onSight);
    return () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", onSight);
    };
  }, []);
}
