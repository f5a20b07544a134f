// What the page says, in English and Chinese.

const WORDS = {
  en: {
    again: "Answer again", answerOf: (i, n) => `${i} of ${n}`, auto: "server's choice", broken: "The connection broke before the answer was complete.",
    compare: "Compare", compareHint: "Put the same question to two models", conversation: "Conversation", copied: "Copied",
    copy: "Copy the answer", cut: "cut off at the limit of tokens", done: "The answer is complete.", down: "Bad answer",
    enter: "Enter", failed: "No answer.", first: (s) => `first after ${s} s`, key: "API key", keys: "Enter sends, Shift+Enter begins a new line, Esc stops an answer.",
    keyWanted: "This server asks for a key.", language: "中文", left: "Previous answer", maxTokens: "Longest answer, tokens",
    model: "Model", newChat: "New chat", note: "Note", noteHint: "What is good or bad about this answer?", noModels: "The server names no model.",
    question: "Ask something", rate: (r) => `${r} tokens/s`, reasoning: "Reasoning", thinking: "Thinking …",
    report: "Report", right: "Next answer", save: "Save", saved: "Saved", secondModel: "Second model", seed: "Seed",
    seedHint: "another every time", send: "Send", settings: "Settings", settingsHint: "They count from the next answer on, and are kept in this browser.",
    stop: "Stop", stopped: "stopped", system: "System prompt", systemHint: "Who the model is, how it should answer",
    temperature: "Temperature, 0 to 2", tokens: (n) => (n === 1 ? "1 token" : `${n} tokens`), topP: "Top p, above 0 to 1", up: "Good answer",
    unreachable: "The server cannot be reached.", unsaved: "Not saved", welcome: "Ask the model something.",
  },
  zh: {
    again: "重新回答", answerOf: (i, n) => `${i} / ${n}`, auto: "由服务器决定", broken: "连接中断，回答不完整。",
    compare: "对比", compareHint: "向两个模型提同一个问题", conversation: "对话", copied: "已复制",
    copy: "复制回答", cut: "达到长度上限，已截断", done: "回答完毕。", down: "回答不好",
    enter: "进入", failed: "没有得到回答。", first: (s) => `首字 ${s} 秒`, key: "API 密钥", keys: "Enter 发送，Shift+Enter 换行，Esc 停止回答。",
    keyWanted: "此服务器需要密钥。", language: "English", left: "上一个回答", maxTokens: "回答长度上限（词元）",
    model: "模型", newChat: "新对话", note: "备注", noteHint: "这个回答好在哪里，或不好在哪里？", noModels: "服务器没有给出模型。",
    question: "输入问题", rate: (r) => `${r} 词元/秒`, reasoning: "推理过程", thinking: "思考中……",
    report: "报告", right: "下一个回答", save: "保存", saved: "已保存", secondModel: "第二个模型", seed: "随机种子",
    seedHint: "每次不同", send: "发送", settings: "设置", settingsHint: "从下一个回答起生效，保存在此浏览器中。",
    stop: "停止", stopped: "已停止", system: "系统提示词", systemHint: "模型的身份，以及如何回答",
    temperature: "温度（0 到 2）", tokens: (n) => `${n} 个词元`, topP: "Top p（大于 0，至 1）", up: "回答很好",
    unreachable: "无法连接服务器。", unsaved: "未保存", welcome: "向模型提问。",
  },
};

// Values that survive a reload, where the browser lets us keep any.
export function remember(name, value) {
  try { localStorage.setItem(`athanor.${name}`, value); } catch { /* private mode: then not */ }
}

export function recall(name) {
  try { return localStorage.getItem(`athanor.${name}`); } catch { return null; }
}

const wished = recall("language") ?? navigator.language.slice(0, 2);
let language = wished in WORDS ? wished : "en";

export function say(key, ...values) {
  const word = WORDS[language][key];
  return typeof word === "function" ? word(...values) : word;
}

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  remember("language", language);
}

// Put words into every element under `root` that names one.
export function translate(root) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const [attribute, put] of [
    ["data-say", (e, word) => { e.textContent = word; }],
    ["data-say-label", (e, word) => e.setAttribute("aria-label", word)],
    ["data-say-title", (e, word) => e.setAttribute("title", word)],
    ["data-say-placeholder", (e, word) => e.setAttribute("placeholder", word)],
  ]) {
    const all = [...root.querySelectorAll(`[${attribute}]`), ...(root.matches?.(`[${attribute}]`) ? [root] : [])];
    for (const e of all) put(e, say(e.getAttribute(attribute)));
  }
}
