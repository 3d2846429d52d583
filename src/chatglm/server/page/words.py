"""Every text of the page in its two languages."""

from __future__ import annotations

WORDS: dict[str, tuple[str, str]] = {
    # key: (English, Chinese)
    "title": ("Chat with {model}", "与 {model} 对话"),
    "conversations": ("Conversations", "对话"),
    "new": ("New conversation", "新对话"),
    "untitled": ("New conversation", "新对话"),
    "model": ("Model", "模型"),
    "name": ("Name", "名称"),
    "rename": ("Rename", "重命名"),
    "delete": ("Delete", "删除"),
    "export_markdown": ("Export Markdown", "导出 Markdown"),
    "export_json": ("Export JSON", "导出 JSON"),
    "language": ("Language", "语言"),
    "dark": ("Dark / light", "深色 / 浅色"),
    "manage": ("This conversation", "此对话"),
    "settings": ("Settings", "设置"),
    "system": ("System instruction", "系统指令"),
    "system_hint": ("How the model should answer, for example: be brief.", "希望模型怎样回答，例如：请简短回答。"),
    "temperature": ("Temperature", "温度"),
    "temperature_hint": ("0: always the likeliest word", "0：总是选最可能的词"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: off)", "Top-k（0：不限）"),
    "max_tokens": ("Longest answer (tokens)", "回答最大长度（词元）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed (empty: random)", "随机种子（空：随机）"),
    "reset": ("Defaults", "恢复默认"),
    "question": ("Message", "消息"),
    "question_hint": ("Enter sends, Shift+Enter starts a new line", "回车发送，Shift+回车换行"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "undo": ("Undo", "撤销"),
    "previous": ("Previous answer", "上一个回答"),
    "next": ("Next answer", "下一个回答"),
    "prefer": ("This one is better", "这个更好"),
    "chat": ("Conversation", "对话内容"),
    "empty": (
        "### Hello\nAsk anything, in English or Chinese. Conversations stay in this browser.",
        "### 你好\n用中文或英文提问。对话只保存在这个浏览器里。",
    ),
    "warning": (
        "Answers may be wrong. Check what matters.",
        "回答可能有误，重要内容请核实。",
    ),
    "feedback": ("Rate the answer", "评价回答"),
    "thumb": ("Helpful?", "有帮助吗？"),
    "thumb_up": ("Yes", "有"),
    "thumb_down": ("No", "没有"),
    "rating": ("Rating (1 poor – 5 very good)", "评分（1 差 – 5 很好）"),
    "correction": ("A better answer", "更好的回答"),
    "correction_hint": ("Write what the answer should have been.", "写出应有的回答。"),
    "tags": ("What was wrong?", "哪里不好？"),
    "tag_wrong": ("wrong", "有错误"),
    "tag_unsafe": ("unsafe", "不安全"),
    "tag_off_topic": ("off topic", "跑题"),
    "tag_language": ("language", "语言"),
    "tag_other": ("other", "其他"),
    "comment": ("Comment", "备注"),
    "consent": (
        "I agree that this conversation, this answer and my rating are stored on this server to improve the model.",
        "我同意将此对话、此回答和我的评价保存在本服务器上，用于改进模型。",
    ),
    "save_feedback": ("Save rating", "保存评价"),
    "delete_feedback": ("Delete rating", "删除评价"),
    "no_store": (
        "This server keeps no ratings (it was started without --feedback-db).",
        "本服务器不保存评价（启动时未指定 --feedback-db）。",
    ),
    "saved": ("Saved. Thank you.", "已保存，谢谢。"),
    "deleted": ("Deleted.", "已删除。"),
    "needs_consent": ("Nothing was stored: tick the consent first.", "尚未保存：请先勾选同意。"),
    "needs_opinion": (
        "Give a thumb, a rating or a better answer first.",
        "请先点赞或点踩、评分或写出更好的回答。",
    ),
    "needs_answer": ("There is no answer to rate yet.", "还没有可以评价的回答。"),
    "needs_question": ("Write something first.", "请先输入内容。"),
    "failed": ("It could not be answered: {reason}", "无法回答：{reason}"),
    "status": (
        "{rate} tokens/s · {answer} tokens · {used} of {context} tokens of the context",
        "{rate} 词元/秒 · 回答 {answer} 词元 · 上下文 {used} / {context}",
    ),
    "dropped": (
        "the oldest {dropped} rounds no longer fit and were left out",
        "最早的 {dropped} 轮对话放不下，已略去",
    ),
    "cut": ("stopped at the longest length", "达到最大长度而停止"),
    "stopped": ("stopped", "已停止"),
    "ask_key": ("Your key for this server", "请输入本服务器的密钥"),
    "wrong_key": ("This is not a key of this server.", "密钥不正确。"),
    "unreachable": ("The server cannot be reached. Try again in a moment.", "无法连接服务器，请稍后再试。"),
    "no_answer": ("no answer", "没有回答"),
    "empty_answer": ("empty answer", "空回答"),
    "rated": ("Rating answer {number} of {count}", "正在评价第 {number} / {count} 个回答"),
    "busy": (
        "The last action is not finished yet: wait a moment, or stop the answer.",
        "上一步操作尚未完成，请稍候，或先停止回答。",
    ),
    "waiting": ("waiting for a turn…", "排队等待中…"),
}

ERRORS: dict[str, tuple[str, str]] = {
    "context_length_exceeded": (
        "the question is too long for the model's context. Shorten it, or lower the longest answer.",
        "问题超出模型的上下文长度。请缩短问题，或调低回答最大长度。",
    ),
    "exceeds_kv_memory": ("the question is too long for this server's memory.", "问题超出服务器的内存。"),
    "overloaded": ("too many people are asking now. Try again in a moment.", "当前请求过多，请稍后再试。"),
    "queue_timeout": ("it waited too long for its turn. Try again.", "排队时间过长，请再试一次。"),
    "request_timeout": ("it took longer than the server allows.", "用时超过服务器限制。"),
    "draining": ("the server is shutting down.", "服务器正在关闭。"),
    "engine_restarting": ("the engine is being restarted. Try again in a moment.", "引擎正在重启，请稍后再试。"),
    "rate_limit_exceeded": ("you asked too often. Wait a little.", "请求过于频繁，请稍等。"),
    "feedback_unavailable": ("the rating could not be stored. Try again.", "评价未能保存，请再试一次。"),
    "internal_error": ("something broke in the server.", "服务器出错。"),
}
"""By the API's error code; other codes show the API's own message."""

PREFIX = "chatglm."


def word(key: str, language: str, **values: object) -> str:
    """One text. Unknown languages read English."""
    text = WORDS[key][1 if language == "zh" else 0]
    return text.format(**values) if values else text


def error_text(code: str, message: str, language: str) -> str:
    """What went wrong, for a reader."""
    if code in ERRORS:
        return ERRORS[code][1 if language == "zh" else 0]
    return message


def translations() -> dict[str, dict[str, str]]:
    """For Gradio's own choice by the browser's language. It translates any text that equals a key: hence the prefix."""
    english = {PREFIX + key: pair[0] for key, pair in WORDS.items()}
    chinese = {PREFIX + key: pair[1] for key, pair in WORDS.items()}
    return {"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese, "zh-HK": chinese}
