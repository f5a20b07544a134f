// A model's text as nodes: code blocks and `code`, the rest as it stands. Only textContent is ever set, so it cannot become HTML.

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function prose(text) {
  const made = document.createElement("p");
  text.split(/`([^`\n]+)`/).forEach((part, i) => { if (part) made.append(i % 2 ? element("code", part) : part); });
  return made;
}

export function draw(text) {
  const made = document.createDocumentFragment();
  let lines = [], code = false;
  const end = () => {
    const block = lines.join("\n");
    if (code) {
      const pre = document.createElement("pre");
      pre.tabIndex = 0; // a long line is scrolled by keyboard too
      pre.append(element("code", block));
      made.append(pre);
    } else if (block.trim()) {
      made.append(prose(block.replace(/^\n+|\s+$/g, "")));
    }
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line) && (!code || /^\s*```\s*$/.test(line))) {
      end();
      code = !code;
    } else {
      lines.push(line);
    }
  }
  end();
  return made;
}
