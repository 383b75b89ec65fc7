"""How near a question is to the wordings under which an answer is known.

Words are compared by their stems; words that mean the same here ("sample" and "row") have one stem. A rare word says
more than a frequent one. A word of the question that no answer has counts against every answer, so that a question
about something else finds none.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

_STOP_WORDS_TEXT = (
    "a about after again all also always am an and any anyone are as at be because been being but by can could d did "
    "do does doing even ever for from get gets give go good got had has have he help her here his how i if im in into "
    "is it its just know let ll make makes may me mean means might must my need needs now of off on one only or our "
    "out please put really s say says she should so some somebody someone something still such t than that the their "
    "them then there these they thing things this those to too try up us use used using ve very want was way we well "
    "were what whats when where which while who why will with within would you your yours issue problem bug help "
    "documentation docs helping critical fixed cause keep keeps seem seems during sudden suddenly already another "
    "quite way weird strange hello hi hey thanks thank everyone everybody guys folks currently recently lately today "
    "sometimes often usually constantly whenever crazy lot lots bit like really actually basically simply maybe "
    "perhaps possible possibly able looking trying tried want wanted wondering wonder curious know understand guess "
    "think thought sure particular particularly specific specifically kind sort whatever whatsoever anyway done happen "
    "happens happened reason"
)
_STOP_WORDS = frozenset(_STOP_WORDS_TEXT.split())
_NAMES_TEXT = (
    "alpaca axolotl bert chatglm deepseek factory falcon gemma glm google gpt gpt2 kohya llama llama2 llama3 "
    "llamafactory meta mistral mixtral openchat oss phi qwen qwen2 qwen3 sft sfttrainer slimtune smollm smollm2 "
    "tinyllama trainer unsloth vicuna"
)
_NAMES = frozenset(_NAMES_TEXT.split())
"""Names of models and tools, which seldom tell what a question is about."""
_JARGON_TEXT = (
    "adapter attn bf16 bfloat16 bitsandbyt ckpt checkpoint cuda dpo eo epoch finetun float16 fp16 gguf gpu huggingface "
    "hyperparameter kaggl kto llama llm lora lr mlx moe mps mxfp4 nan nf4 ollama oom overfit peft pretrain qlora "
    "multiturn quantiz rocm sft sfttrainer sglang tgi token tokenizer torch transformer trl unsloth vllm vram wandb"
)
_JARGON = frozenset(_JARGON_TEXT.split())
"""Stems that only a question about language models has, or two of these: stems that have another meaning elsewhere."""
_AMBIGUOUS_JARGON_TEXT = (
    "train model loss dataset row answer prompt memory merge rate rank template base inferenc infer"
)
_AMBIGUOUS_JARGON = frozenset(_AMBIGUOUS_JARGON_TEXT.split())
_ANY_JARGON = _JARGON | _AMBIGUOUS_JARGON
_OTHER_SUBJECTS_TEXT = (
    "android angular css django flask git html javascript kubernet laravel matplotlib migr npm panda postgr "
    "react retriever selenium sql vectorstor vue webpack yarn"
)
_OTHER_SUBJECTS = frozenset(_OTHER_SUBJECTS_TEXT.split())
"""Stems that make a question without jargon one about something else."""
_SAME_WORDS = (
    "row sample example record datapoint pair instance",
    "dataset data corpus",
    "answer reply response output completion respond",
    "question query",
    "model bot chatbot assistant llm slm",
    "train retrain",
    "repeat loop repetition repetitive repetitious",
    "invent hallucination hallucinate fabricate confabulate",
    "stop abort cancel halt interrupt quit terminate pause",
    "enough sufficient suffice adequate",
    "forget forgot forgotten forgets forgetting unlearn",
    "gpu card graphics",
    "machine computer pc hardware compute computing computational computation resource resources",
    "affect affects affecting influence influences",
    "effect impact",
    "fail fails failed failing failure impossible unable",
    "language english german french spanish italian portuguese polish dutch russian chinese japanese korean arabic",
    "buy purchase buying",
    "commercial commercially business sell sold selling",
    "licence license licensing licensed licences licenses",
    "upload send sent transmit uploaded",
    "privacy private confidential gdpr sensitive personal",
    "several multiple",
    "same identical",
    "wrong incorrect false",
    "slow slower slowly",
    "time duration hour hours minute minutes day days",
    "broken invalid malformed break breaks corrupt",
    "cut truncate truncated incomplete unfinished",
    "fact knowledge",
    "gibberish nonsense garbage garbled rubbish",
    "large big size huge",
    "require requirement required requires necessary needed minimum least",
    "form format layout structure",
    "own custom customize customized customise personal",
    "performance quality",
    "result outcome",
    "prepare construct create build",
    "cost price expensive cheap cheaper cheapest costs",
    "memory vram ram",
    "mac macbook macos apple mps",
    "start begin",
    "resume continue",
    "serve server serving deploy host hosting",
    "merge merged merging fuse",
    "convert export conversion",
    "fall decrease drop decline reduce lower",
    "rise increase grow",
    "explode diverge",
    "not no never none cannot without",
    "better best improve improved improvement",
    "bad worse poor worst",
    "hub huggingface",
    "internet online network",
    "phrase sentence",
    "rate lr",
    "picture image photo",
    "different differ differs difference vs versus",
    "reduce lower",
    "remove delete",
    "allowed permitted permission legal legally lawful",
    "hang hung stuck freeze frozen stall",
    "active activated",
    "switch swap",
    "infer inference inferring",
    "throughput speed fast faster",
)
_PHRASES = (
    (r"\b(?:i )?(?:have|had|got) (?:a |some |one )?(?:quick )?questions? (?:about|regarding|on|concerning)\b", " "),
    (r"^(?:hi|hello|hey)\b|\bthank(?:s| you)\b|\bcould you (?:please )?(?:tell|explain|share|provide)\b", " "),
    (r"\bfine[- ]?tun\w*|\btun(?:e|ed|ing)\b", "finetun train"),
    (r"hugging[- ]face", "huggingface"),
    (r"\b(?:2|3|two|three)(?= (?:or more )?(?:loras?|adapters?)\b)", "several"),
    (r"\bmulti[- ]?turns?\b", "multiturn"),
    (r"\bhow (?:long|many (?:hours|days|minutes))\b", "duration"),
    (r"\bhow (?:much|many) (?:\w+ )?(?:vram|memory|ram|gigabytes|gb)\b", "memory require"),
    (r"\bm[1-5](?: (?:pro|max|ultra))?\b|\bmacs?\b|\bmacbooks?\b|\bapple silicon\b", " mac "),
    (r"n['’]t\b|\b(?:do|does|did|wo|ca|is|are)nt\b|\bcannot\b|\bno longer\b", " not"),
    (r"\b(?:mak|made|mad)\w* (?:\w+ )?up\b", "invent"),
    (r"\bover and over\b|\bagain and again\b", "repeat"),
    (r"\bctrl ?[-+] ?c\b|\bcontrol[- ]c\b|\^c\b", "interrupt"),
    (r"\bgraphics? cards?\b", "gpu"),
    (r"\bmid[- ]?(?=sentence)", "middle "),
    (r"\bwarm[- ]?up\b", "warmup"),
    (r"\b(?:run|runs|ran|running)? ?out of (?:\w+ )?(?:memory|vram|ram)\b", "oom"),
    (r"\b(?:memory|vram) (?:is )?full\b|outofmemory\w*", "oom"),
)

_SMALL, _NAME, _UNASKED, _TELLING = 0.04, 0.12, 0.4, 0.45
"""Weights, as shares of the weight of the rarest word of the wordings: of a small word, of a name, of a word that only
the texts of answers have, and from which on a word tells what a question is about."""
_UNKNOWN = (1.6, 0.6, 0.2)
"""The same of a word that nothing has, in a question without jargon, with ambiguous jargon, and with jargon."""
_CONFIDENCE = (-4.66, 4.89, 3.83, -1.56, 0.18, -0.8, 0.85, 0.06)
"""Weights of what the confidence of an answer depends on: a constant, its score, its lead, the share of unknown words,
whether the question is surely about language models, whether it has no jargon, telling words and all words."""
_LEAST_SCORE_OUTSIDE_JARGON = 0.6
"""The sum of score and lead below which a question that may be about something else has no answer."""
_SIZE = re.compile(r"\d+(?:b|gb?|k|x)?")


def split_into_stems_marking_small_words(text: str) -> list[str]:
    """Return the stems of a text's words in their order; small words, which say little, have a ~ before them."""
    text = text.lower().replace("`", "").replace("_", " ")
    for pattern, word in _PHRASES:
        text = re.sub(pattern, word, text)
    words = re.findall(r"[^\W_]+", text.replace("'", ""))
    return [f"~{word}" if word in _STOP_WORDS else _stem(word) for word in words]


@cache
def _stem(word: str) -> str:
    if _SIZE.fullmatch(word):
        return "#"
    return _SYNONYMS.get(word) or _SYNONYMS.get(_strip_ending(word)) or _strip_ending(word)


def _strip_ending(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-3] + "y" if word.endswith("ies") else word[:-1]
    for ending in ("ization", "isation", "ation", "ating", "ated", "ator", "ate", "ing", "ed", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls" else word
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


_SYNONYMS: dict[str, str] = {}
for _group in _SAME_WORDS:
    _first, *_others = _group.split()
    for _word in (_first, *_others):
        _SYNONYMS.setdefault(_word, _first)
        _SYNONYMS.setdefault(_strip_ending(_word), _first)


def _rate_jargon(stems: set[str]) -> int:
    """Return 2 if a question is surely about language models by its words, 1 if it may be, else 0."""
    return 2 if stems & _JARGON else int(len(stems & _AMBIGUOUS_JARGON) > 1)


class WordingIndex:
    """Finds the answers whose wordings are nearest to a question.

    `wordings` has for each answer the ways in which it is asked for, `texts` what it says. The score of an answer is
    between 0 and 1: mostly how alike the question and the nearest wording are (the weight of the words that both have,
    over the geometric mean of their weights), and to smaller parts which share of the question's words is in any of
    the answer's wordings, and in its text.
    """

    def __init__(self, wordings: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> None:
        self.wordings = {
            name: [set(split_into_stems_marking_small_words(each)) for each in asked]
            for name, asked in wordings.items()
        }
        self.known = {name: set().union(*asked) for name, asked in self.wordings.items()}
        self.texts = {
            name: words | set(split_into_stems_marking_small_words(texts[name])) for name, words in self.known.items()
        }
        counts = Counter(word for words in self.known.values() for word in words if word[0] != "~")
        self.weights = {word: math.log(1 + len(counts) / count) for word, count in counts.items()}
        most = max(self.weights.values())
        self.weights |= dict.fromkeys(("#", "not", "error", "require"), 0.3 * most)
        self.least_telling = _TELLING * most
        self.unknown_weights = [share * most for share in _UNKNOWN]
        self.weights |= {f"~{word}": _SMALL * most for word in _STOP_WORDS} | dict.fromkeys(_NAMES, _NAME * most)
        for word in set().union(*self.texts.values()):
            self.weights.setdefault(word, _UNASKED * most)
        self.long_words = [word for word in (*counts, *_SYNONYMS) if len(word) >= 5]
        self.corrected: dict[str, str] = {}

    def score(self, question: str) -> dict[str, float]:
        """Return the score of each answer that shares a word with a question."""
        asked = self._split(question)
        unknown = {word for word in asked if word not in self.weights}
        unknown_weight = self.unknown_weights[_rate_jargon(asked)]
        total = self._weigh(asked - unknown) + sum(self._weigh_unknown(word, unknown_weight) for word in unknown)
        asked -= unknown
        scores: dict[str, float] = {}
        for name, wordings in self.wordings.items():
            if near := max(
                (self._compare(asked, words, total, bool(unknown)) for words in wordings if words), default=0.0
            ):
                known, told = (self._weigh(asked & words[name]) / total for words in (self.known, self.texts))
                scores[name] = 0.7 * near + 0.2 * known + 0.1 * told
        return scores

    def estimate_confidence(self, question: str, answer: str, score: float, lead: float) -> float:
        """Estimate the probability that an answer is right; `lead` is by how much its score exceeds the next one's.

        The weights are those of a logistic regression over labelled questions, and over the wordings, each of them
        asked as if nobody had written it down.
        """
        asked = self._split(question)
        jargon = _rate_jargon(asked)
        if jargon < 2 and (asked & _OTHER_SUBJECTS or score + lead < _LEAST_SCORE_OUTSIDE_JARGON):
            return 0.0
        unknown = {word for word in asked if word not in self.weights}
        unknown_weight = sum(self._weigh_unknown(word, self.unknown_weights[jargon]) for word in unknown)
        total = self._weigh(asked - unknown) + unknown_weight
        telling = sum(self.weights[word] >= self.least_telling for word in asked & self.known[answer])
        features = (
            1.0, score, min(lead, 0.4), unknown_weight / total, jargon == 2, not asked & _ANY_JARGON, min(telling, 4),
            sum(word[0] != "~" for word in asked),
        )  # fmt: skip
        return 1 / (1 + math.exp(-sum(weight * each for weight, each in zip(_CONFIDENCE, features, strict=True))))

    def _split(self, question: str) -> set[str]:
        return {self._correct(word) for word in split_into_stems_marking_small_words(question)}

    def _compare(self, asked: set[str], words: set[str], total: float, has_unknown: bool) -> float:
        """Return how alike two sets of words are, 0 to 1; one common word, or common ones that are all frequent in
        wordings ("model", "train"), say little among others."""
        common = {word for word in asked & words if word[0] != "~"}
        if not common:
            return 0.0
        alike = self._weigh(asked & words) / math.sqrt(total * self._weigh(words))
        is_telling = max(self.weights[word] for word in common) >= self.least_telling
        is_whole = not has_unknown and common == {word for word in asked | words if word[0] != "~"}
        if (is_telling and (is_whole or len(common - {"#", "not"}) > 1)) or (asked == words and not has_unknown):
            return alike
        return 0.7 * alike

    def _correct(self, word: str) -> str:
        """Return a known stem for a long word that differs from it by a typing error."""
        if word in self.weights or len(word) < 6:
            return word
        if word not in self.corrected:
            alike = [each for each in self.long_words if each[0] == word[0] and abs(len(each) - len(word)) < 4]
            near = difflib.get_close_matches(word, alike, 1, 0.8)
            self.corrected[word] = _SYNONYMS.get(near[0], near[0]) if near else word
        return self.corrected[word]

    def _weigh_unknown(self, word: str, weight: float) -> float:
        """Return the weight of a word that nothing here has; beside jargon it is a detail, else another subject."""
        return self.weights["#"] if any(sign.isdigit() for sign in word) else weight  # 8b, t4

    def _weigh(self, words: set[str]) -> float:
        return sum(self.weights[word] for word in words)
