"""How near a question is to the wordings under which an answer is known.

Words are compared by their stems; words that mean the same here ("sample" and "row") have one stem. A rare word says
more than a frequent one, and two words in the same order say more than each alone. A word of the question that no
answer has counts against every answer, so that a question about something else finds none. Three measures rank the
answers: the nearest wording, the nearest four, and BM25 over all wordings of an answer.
"""

import difflib
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from .chinese_words import translate_chinese_words

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
    "gpu card graphics rtx gtx geforce",
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
    (r"\bany (?:idea|suggestion|advice|hint|help|clue|thought|pointer)s?\b", " "),
    (r"\bfine[- ]?tun\w*|\btun(?:e|ed|ing)\b", "finetun train"),
    (r"hugging[- ]face", "huggingface"),
    (r"\b(?:large )?language models?\b", "model"),
    (
        r"\b(?:on|with|using|for) (?:my|our|their|your|a|the)? ?(?:own|custom\w*) (?:training )?(?:data ?sets?|data)\b",
        "owndata",
    ),
    (r"\blora(?:wan)? modules?\b|\blorawan\b|\blora (?:radio|gateway|node)s?\b", "radio"),
    (r"\bllama[-. ]?cpp(?:[- ]python)?\b|\bllama-(?:server|cli)\b", "llamacpp"),
    (r"\blm ?studio\b", "lmstudio"),
    (r"\bopen ?ai\b", "openai"),
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
    (r"\b(\d+) ?(?:g|gb|gib|gigs?)\b", r"\1gb"),
    (r"\b(\d+)[- ]?bits?\b", r"\1bit"),
    (r"\b(?:(?:rtx|gtx) ?)?((?:[1-5]0|16)[5-9]0)(?: ?ti)?(?: super)?\b", r"rtx\1 gpu"),
    (r"\bmid[- ]?(?=sentence)", "middle "),
    (r"\bwarm[- ]?up\b", "warmup"),
    (r"\b(?:run|runs|ran|running)? ?out of (?:\w+ )?(?:memory|vram|ram)\b", "oom"),
    (r"\b(?:memory|vram) (?:is )?full\b|outofmemory\w*", "oom"),
)

_FIELD_TEXT = (
    "adapter amd batch checkpoint cuda dataset dpo epoch finetun forget gguf gpu gradient grpo huggingface infer "
    "instruct invent kto learn linux llm lora loss mac memory mlx model nan nvidia ollama overfit peft prompt "
    "qlora quantiz rank row slimtun template token train vllm vram windows"
)
_SMALL, _NAME, _VAGUE, _UNKNOWN, _PAIR = 0.08, 0.3, 0.3, 0.6, 0.3
"""Weights, as shares of the weight of the rarest word: of a small word, of a name, of a number or a word such as
"error", and of a word that no wording has; and that of two words in a row, as a share of its own rarity."""
_MOST_LEAD = 0.9
"""A larger lead over the next answer says no more."""
_NEAREST = 4
"""How many of an answer's nearest wordings count."""
_DEFINITION = 0.85
"""The share of its score that a definition keeps."""
_SATURATION, _LENGTH = 1.2, 0.75
"""BM25's k1 and b."""
_CONFIDENCE = (-3.79, 1.58, 3.41, -3.25, 2.0, 1.72, 1.61, -2.66, 1.14)
_CONFIDENCE_OF_THREE = (-4.69, 2.21, 0.61, -2.89, 2.14, 2.0, 3.0, 3.37, 3.66)
"""Weights of what the confidence depends on, in the first answer and in the first three: a constant, its score, its
lead, the share of unknown words, the logarithm of its BM25, whether the question has a word of the field, what was
added to its score and to the second's, and how alike its nearest wording is. benchmarks/asked.py fits them."""
_SIZE = re.compile(r"\d+(?:b|k|x)?")


def split_into_stems_marking_small_words(text: str) -> list[str]:
    """Return the stems of a text's words in their order; small words, which say little, have a ~ before them."""
    text = translate_chinese_words(text.lower().replace("`", "").replace("_", " "))
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


_FIELD = frozenset(map(_stem, _FIELD_TEXT.split()))
"""Words of which a question about this subject mostly has one."""


def _pair_neighbours(stems: Sequence[str]) -> set[str]:
    return {f"{first} {second}" for first, second in pairwise(stems) if not {first[0], second[0]} <= {"~", "#"}}


@dataclass(frozen=True)
class RankedAnswers:
    """The answers that share a word with a question, the nearest first."""

    scores: dict[str, float]
    """The score of each: how alike the question and its nearest wordings are, its share of BM25, and what was added."""
    nearest: float
    """How alike the question and the nearest wording of the first answer are, 0 to 1."""
    added: Mapping[str, float]
    """What was added to each score."""
    features: tuple[float, ...]
    """What the confidence depends on."""

    @property
    def confidence(self) -> float:
        """The estimated probability that the first answer is right."""
        return _estimate(_CONFIDENCE, self.features)

    @property
    def confidence_of_three(self) -> float:
        """The estimated probability that one of the first three answers is right."""
        return _estimate(_CONFIDENCE_OF_THREE, self.features)


def _estimate(weights: Sequence[float], features: Sequence[float]) -> float:
    return 1 / (1 + math.exp(-sum(map(operator.mul, weights, features))))


class WordingIndex:
    """Ranks answers by their wordings; `wordings` has for each answer the ways in which it is asked for.

    `definitions` are answers that only say what a word means: they come after others that are nearly as near.
    """

    def __init__(self, wordings: Mapping[str, Sequence[str]], definitions: Collection[str] = ()) -> None:
        self.definitions = definitions
        self.owners = [name for name, asked in wordings.items() for _ in asked]
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in wordings}
        self.uses = defaultdict[str, list[int]](list)
        words_of_wordings = []
        for index, text in enumerate(each for asked in wordings.values() for each in asked):
            stems = split_into_stems_marking_small_words(text)
            words = {*stems, *_pair_neighbours(stems)}
            words_of_wordings.append(words)
            self.counts[self.owners[index]].update(word for word in words if word[0] != "~")
            for word in words:
                self.uses[word].append(index)
        weights = {
            word: math.log(1 + len(wordings) / len({self.owners[index] for index in uses}))
            for word, uses in self.uses.items()
        }
        self.most = max(weight for word, weight in weights.items() if " " not in word)
        weights = {word: weight * _PAIR if " " in word else weight for word, weight in weights.items()}
        weights |= dict.fromkeys(("#", "not", "error", "require"), _VAGUE * self.most)
        weights |= dict.fromkeys(_NAMES, _NAME * self.most)
        self.weights = weights | {f"~{word}": _SMALL * self.most for word in _STOP_WORDS}
        self.lengths = [math.sqrt(self._weigh(words)) for words in words_of_wordings]
        self.sizes = {name: sum(words.values()) for name, words in self.counts.items()}
        self.mean_size = sum(self.sizes.values()) / len(self.sizes)
        single = (word for word in self.uses if " " not in word and word[0] != "~")
        self.long_words = [word for word in (*single, *_SYNONYMS) if len(word) >= 5]

    def rank(self, question: str, added: Mapping[str, float]) -> RankedAnswers | None:
        """Rank the answers to a question; `added` is what else speaks for an answer. None if nothing speaks for any."""
        stems = [self._correct(word) for word in split_into_stems_marking_small_words(question)]
        known = {word for word in (*stems, *_pair_neighbours(stems)) if word in self.weights}
        unknown = sum(
            _VAGUE if any(map(str.isdigit, word)) else _UNKNOWN for word in set(stems) - known
        ) * self.most  # fmt: skip
        total = self._weigh(known) + unknown
        likenesses = self._compare(known, total)
        bm25 = {name: self._score_bm25(name, known) for name in likenesses}
        scores = {
            name: (each[0] + sum(each[:_NEAREST]) / _NEAREST + bm25[name] / total)
            * (_DEFINITION if name in self.definitions else 1)
            for name, each in likenesses.items()
        }
        for name, score in added.items():
            if score:
                scores[name] = scores.get(name, 0.0) + score
        if not scores:
            return None
        first, *others = sorted(scores, key=lambda name: scores[name], reverse=True)
        nearest = likenesses[first][0] if first in likenesses else 0.0
        features = (
            1.0,
            scores[first],
            min(scores[first] - (scores[others[0]] if others else 0.0), _MOST_LEAD),
            unknown / total if total else 0.0,
            math.log(0.05 + bm25.get(first, 0.0) / self.most),
            float(not _FIELD.isdisjoint(known)),
            added.get(first, 0.0),
            added.get(others[0], 0.0) if others else 0.0,
            nearest,
        )
        return RankedAnswers({name: scores[name] for name in (first, *others)}, nearest, added, features)

    def _compare(self, known: set[str], total: float) -> dict[str, list[float]]:
        """Return how alike a question and the wordings of each answer are, 0 to 1, the nearest first: the weight of the
        words that both have, over the geometric mean of their weights. Wordings with small words alone are left out."""
        shared = defaultdict[int, float](float)
        for word in known:
            if word[0] != "~" and " " not in word:
                for index in self.uses[word]:
                    shared[index] += self.weights[word]
        for word in known:
            if word[0] == "~" or " " in word:
                for index in self.uses.get(word, ()):
                    if index in shared:
                        shared[index] += self.weights[word]
        likenesses = defaultdict[str, list[float]](list)
        for index, weight in shared.items():
            likenesses[self.owners[index]].append(weight / (math.sqrt(total) * self.lengths[index]))
        return {name: sorted(each, reverse=True) for name, each in likenesses.items()}

    def _score_bm25(self, name: str, known: set[str]) -> float:
        """Return BM25 of an answer, at most the weight of the question's words."""
        counts, size = self.counts[name], self.sizes[name] / self.mean_size
        damping = _SATURATION * (1 - _LENGTH + _LENGTH * size)
        return sum(self.weights[word] * counts[word] / (counts[word] + damping) for word in known if word in counts)

    @cache  # noqa: B019 - one index lives as long as the program
    def _correct(self, word: str) -> str:
        """Return a known stem for a long word that differs from it by a typing error."""
        if word in self.weights or len(word) < 6:
            return word
        alike = [each for each in self.long_words if each[0] == word[0] and abs(len(each) - len(word)) < 4]
        near = difflib.get_close_matches(word, alike, 1, 0.8)
        return _SYNONYMS.get(near[0], near[0]) if near else word

    def _weigh(self, words: Iterable[str]) -> float:
        return sum(self.weights[word] for word in words)
