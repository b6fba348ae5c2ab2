// The page's only tooltip.

const tip = document.getElementById("tip");

// Shows nodes beside a rectangle of the window (of an element or a point), on a side with room
export function showTip(nodes, { left, right = left, top, bottom = top }) {
  tip.replaceChildren(...nodes.filter(Boolean));
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = bottom + 10 + height < innerHeight || top < height + 10;
  tip.style.left = `${Math.max(8, Math.min((left + right - width) / 2, document.documentElement.clientWidth - width - 8))}px`;
  tip.style.top = `${below ? bottom + 10 : top - height - 10}px`;
}

export function hideTip() {
  tip.hidden = true;
}
addEventListener("scroll", hideTip, { passive: true });
