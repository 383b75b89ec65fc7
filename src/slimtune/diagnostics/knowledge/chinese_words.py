"""Chinese words of this field in English, so that a question in Chinese finds its answer, which is in English."""

import re

_WORDS = {
    "显存": "vram memory", "内存": "memory", "显卡": "gpu", "单卡": "single gpu", "多卡": "several gpus",
    "爆显存": "oom", "显存不足": "oom", "内存不足": "oom", "溢出": "overflow", "笔记本": "laptop", "电脑": "computer",
    "微调": "finetune", "精调": "finetune", "训练": "train", "预训练": "pretrain",
    "增量预训练": "continued pretraining", "继续训练": "continue training", "接着训练": "continue training",
    "再训练": "continue training", "断点续训": "resume training", "恢复训练": "resume training", "继续": "continue",
    "已有的": "existing", "全参数": "full finetuning", "全量": "full finetuning", "学习率": "learning rate",
    "轮": "epoch", "批次": "batch", "批大小": "batch size", "步": "step", "秩": "rank", "参数": "parameter",
    "损失": "loss", "上升": "rise", "升高": "rise", "变大": "rise", "下降": "fall", "降低": "fall",
    "不下降": "loss does not fall", "不收敛": "loss does not fall", "震荡": "jumps", "过拟合": "overfit",
    "欠拟合": "underfit", "验证集": "validation set", "测试集": "test set", "训练集": "training set",
    "数据集": "dataset", "数据": "data", "格式": "format", "样本": "examples", "条": "rows", "多少": "how many",
    "对话": "conversation", "多轮": "multi-turn", "灾难性遗忘": "catastrophic forgetting", "遗忘": "forgetting",
    "缓解": "avoid", "幻觉": "hallucination", "合并": "merge", "导出": "export", "转换": "convert",
    "量化": "quantize", "权重": "weights", "加载": "load", "保存": "save", "推理": "inference", "部署": "deploy",
    "生成": "generate", "回答": "answer", "输出": "output", "乱码": "gibberish", "重复": "repeat",
    "停不下来": "does not stop", "不停": "does not stop", "停止": "stop", "模板": "chat template", "提示词": "prompt",
    "系统提示": "system prompt", "词表": "vocabulary", "分词器": "tokenizer", "新词": "new tokens", "模型": "model",
    "基座": "base model", "底座": "base model", "大模型": "llm", "小模型": "small model", "适配器": "adapter",
    "速度": "speed", "慢": "slow", "快": "fast", "多久": "how long", "时间": "time", "成本": "cost", "需要": "need",
    "最低": "minimum", "配置": "requirements", "硬件": "hardware", "效果": "result", "差": "bad", "变差": "worse",
    "不好": "bad", "没有效果": "no effect", "不生效": "ignored no effect", "没变化": "no change", "报错": "error",
    "失败": "fails", "安装": "install", "版本": "version", "下载": "download", "离线": "offline", "中文": "chinese",
    "英文": "english", "语言": "language", "知识": "knowledge", "注入": "learn", "文档": "documents",
    "知识库": "documents rag", "检索": "retrieval", "强化学习": "grpo reinforcement learning", "奖励": "reward",
    "偏好": "preference", "分类": "classification", "评估": "evaluate", "准确率": "accuracy",
    "函数调用": "tool calls", "工具调用": "tool calls", "思考": "thinking", "身份": "name identity",
    "自我认知": "name identity", "商用": "commercial use", "许可": "licence", "跑不动": "does it run", "跑": "run",
    "支持": "support", "如何": "how", "怎么": "how", "为什么": "why", "哪个": "which", "哪一": "which", "是否": "is",
    "不": "not", "没有": "not", "层": "layer",
}  # fmt: skip
_PATTERN = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)))
_CHINESE = re.compile(r"[\u4e00-\u9fff]+")


def translate_chinese_words(text: str) -> str:
    """Return a text with the Chinese words that are known in English, and without its other Chinese characters."""
    if not _CHINESE.search(text):
        return text
    return _CHINESE.sub(" ", _PATTERN.sub(lambda word: f" {_WORDS[word[0]]} ", text))
