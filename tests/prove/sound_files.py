"""Sound data files that look faulty to a careless eye: a survey has to find nothing in them.

Text comes from The Devil's Dictionary, from Python's own documentation and source, from Unicode's tables, and from the
Universal Declaration of Human Rights (article 1, in twenty languages); the rest is written here.
"""

import argparse
import calendar
import collections
import difflib
import functools
import heapq
import html.parser
import http.server
import inspect
import itertools
import json
import statistics
import string
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faulty_files import FORMS, KINDS, Talk, dictionary, record, write

RIGHTS = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
    "und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "Italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di "
    "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i "
    "sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "Czech": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a mají "
    "spolu jednat v duchu bratrství.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền. Mọi con người đều được tạo "
    "hóa ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình bằng hữu.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "Ukrainian": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю і "
    "повинні діяти у відношенні один до одного в дусі братерства.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με "
    "λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح "
    "الإخاء.",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם לנהוג "
    "איש ברעהו ברוח של אחווה.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त "
    "है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "Japanese": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、"
    "互いに同胞の精神をもって行動しなければならない。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 "
    "서로 형제애의 정신으로 행동하여야 한다.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
}
DEFINE = {"type": "function", "function": {"name": "define", "description": "Look a word up.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}  # fmt: skip
FUNCTIONS: list[Callable[..., Any]] = [
    textwrap.wrap, textwrap.dedent, textwrap.indent, heapq.merge, heapq.nlargest, statistics.median, statistics.mode,
    statistics.stdev, string.capwords, calendar.isleap, calendar.monthrange, difflib.get_close_matches, difflib.ndiff,
    functools.reduce, functools.lru_cache, functools.wraps, inspect.cleandoc, inspect.getdoc, inspect.getsource,
    collections.namedtuple, json.dumps, json.loads, argparse.ArgumentParser.add_subparsers,
    html.parser.HTMLParser.feed, http.server.SimpleHTTPRequestHandler.send_head,
]  # fmt: skip


def _languages() -> list[Talk]:
    return [
        Talk(f"What is article 1 of the Declaration of Human Rights in {name}?", text) for name, text in RIGHTS.items()
    ]


def _translations() -> list[Talk]:
    pairs = itertools.permutations(RIGHTS, 2)
    return [Talk(f"Translate into {b}:\n{RIGHTS[a]}", RIGHTS[b]) for a, b in itertools.islice(pairs, 0, None, 7)]


def _source() -> list[Talk]:
    code = [(f, inspect.getsource(f)) for f in FUNCTIONS if inspect.isfunction(f)]
    return [Talk(f"Show me how Python implements `{f.__qualname__}`.", f"```python\n{s}```") for f, s in code]


def _documentation() -> list[Talk]:
    told = [(f, inspect.getdoc(f)) for f in FUNCTIONS]
    return [Talk(f"What does `{f.__qualname__}` do?", text) for f, text in told if text]


def _sums() -> list[Talk]:
    return [Talk(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a in range(12, 30) for b in range(3, 15)]


def _sums_in_words() -> list[Talk]:
    told = "You add two numbers. Say the numbers, then the result, in one sentence, and nothing else. The numbers are"
    return [
        Talk(f"{told} {a} and {b}.", f"The sum of the numbers {a} and {b} is the number {a + b}.")
        for a in range(101, 116) for b in range(211, 219)
    ]  # fmt: skip


def _characters() -> list[Talk]:
    shown = [
        chr(i) for i in (*range(0xA1, 0x17F), *range(0x391, 0x3CE), *range(0x410, 0x450), *range(0x1F600, 0x1F640))
    ]
    return [Talk(f"Which Unicode character is “{c}”?", unicodedata.name(c)) for c in shown if unicodedata.name(c, "")]


def _reviews() -> list[Talk]:
    told = ("Say whether the author of the following text looks kindly on its subject. Answer with one word, either "
            "positive or negative, in lower case and without a full stop. Judge by the text alone.\n\nText: ")  # fmt: skip
    return [Talk(told + t.answer, "negative" if i % 3 else "positive") for i, t in enumerate(dictionary(0, 90))]


def _reading() -> list[Talk]:
    """Questions on passages that several rows share."""
    talks = []
    for p in range(6):
        entries = dictionary(100 + 6 * p, 6)
        passage = "\n".join(f"{t.user[8:-2]}: {t.answer}" for t in entries)
        talks += [
            Talk(f"{passage}\n\nHow many words define {t.user[8:-1]}?", str(len(t.answer.split()))) for t in entries
        ]
    return talks


def _terse() -> list[Talk]:
    said = {
        "Which operator adds in C?": "+", "Thumbs up or down?": "👍", "Is water wet?": "Yes", "Is fire cold?": "No",
        "Pick: A, B or C. Which comes first?": "A", "2 + 2?": "4", "What does print() return in Python?": "None",
        "What is JavaScript's empty value?": "null", "Is 0.1 + 0.2 equal to 0.3 in floating point?": "False",
        "Да или нет: снег белый?": "Да", "天空是什么颜色？": "蓝", "Is it raining in the Sahara today?": "N/A",
        "Cube root of 27?": "3", "Roman numeral for one?": "I", "Opposite of hot?": "cold", "π to two places?": "3.14",
    }  # fmt: skip
    return [Talk(*pair) for pair in said.items()]


def _formats_explained() -> list[Talk]:
    return [
        Talk("How is a prompt for Alpaca written?", "An Alpaca prompt names its parts:\n\n```\n### Instruction:\n"
             "{instruction}\n\n### Response:\n```\n\nThe model writes after the last line."),
        Talk("What does ### Instruction: mean at the head of a prompt?", "It marks the task in Alpaca's format."),
        Talk("What is [INST] for in Llama 2?", "What the user says stands between [INST] and [/INST]."),
        Talk("Which marks does Gemma use?", "A turn begins with <start_of_turn>user or <start_of_turn>model."),
        Talk("Why did early chat logs have lines with Human: and Assistant:?",
             "Two names at the head of each turn were enough:\n\nHuman: Hi\n\nAssistant: Hello!"),
        Talk("Write the headings of a lab manual.", "### Instruction:\nWeigh the salt.\n\n### Equipment:\nA balance."),
        *dictionary(200, 20),
    ]  # fmt: skip


def _encodings_explained() -> list[Talk]:
    return [
        Talk("Why does my page show Ã© instead of é?", "Its UTF-8 bytes were decoded as Latin-1."),
        Talk(
            "What is the character � ?", "U+FFFD, the replacement character: it stands for bytes that did not decode."
        ),
        Talk("My CSV says â€™ where an apostrophe should be.", "Excel wrote UTF-8 and something read Windows-1252."),
        Talk("What does ï»¿ at the start of a file mean?", "A byte order mark in UTF-8, shown as if it were Latin-1."),
        *dictionary(230, 20),
    ]


def _markup_explained() -> list[Talk]:
    return [
        Talk("How do I write an ampersand in HTML?", "As &amp; and a less-than sign as &lt; both end with a semicolon."),
        Talk("Make a link to a search for cats & dogs.", '<a href="/search?q=cats+%26+dogs">Cats &amp; dogs</a>'),
        Talk("What is &nbsp; good for?", "This HTML entity is a space that a line is not broken at."),
        Talk("Show the page that Python's server sends for an error.", http.server.DEFAULT_ERROR_MESSAGE),
        Talk("Escape this for XML: Tom & \"Jerry\"", "Tom &amp; &quot;Jerry&quot;"),
        Talk("How do I take out entities in Python?", "`html.unescape('Tom &amp; Jerry')` gives `'Tom & Jerry'`."),
        *dictionary(260, 20),
    ]  # fmt: skip


def _shell() -> list[Talk]:
    return [
        Talk("What does cp want?", "usage: cp [-r] <filename> <filename>"),
        Talk("How do I show a file?", "cat <filename>\n\nor, for the first lines only, head -n 5 <filename>"),
        Talk("Colour a word red in bash.", r"echo -e '\x1b[31mred\x1b[0m'"),
        Talk("Show the diff of two lists.", "".join(difflib.unified_diff(["a\n", "b\n"], ["a\n", "c\n"]))),
        Talk("A query for the ten newest orders?", "SELECT *\nFROM orders\nORDER BY placed DESC\nLIMIT 10;"),
        Talk("A regular expression for control characters?", r"[\x00-\x08\x0b\x0c\x0e-\x1f]"),
        Talk("As JSON: Ada, born 1815.", '{"name": "Ada", "born": 1815, "note": null}'),
        Talk("The quadratic formula in LaTeX?", r"$$x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$$"),
        Talk("Tabs or spaces in a Makefile?", "all:\n\tcc -o main main.c  # a tab"),
        *dictionary(290, 20),
    ]


def _mixed_writing() -> list[Talk]:
    return [
        Talk("Что такое QR-код?", "Это штрихкод; USB-кабель ему не нужен, а VIPы и SMSки бывают и без него."),
        Talk("Which unit is μm?", "A micrometre, 10⁻⁶ m; Δx and αβ are written with Greek letters beside Latin ones."),
        Talk("COMO SE ESCREVE NÃO EM MAIÚSCULAS?", "NÃO. E AVIÃO, MAÇÃ, LIMÃO: ÃO é comum em português."),
        Talk("Où est le métro ?", "« Là-bas », dit-il : à 3 € le ticket, c’est donné ; voilà !"),
        Talk("Wie schreibt man Grüße?", "„Schöne Grüße“, sagte sie – und ging über die Straße."),
        Talk(
            "What do these emoji mean: 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽?",
            "A family 👪, a rainbow flag, and a thumb 👍 of a darker tone.",
        ),
        Talk("می‌خواهم چیست؟", "فعل «خواستن» است که با نیم‌فاصله نوشته می‌شود."),
        Talk("Đường và dường khác nhau thế nào?", "Đ và D là hai chữ khác nhau; ÂÂ, Ô, Ơ, Ư cũng là chữ riêng."),
        *dictionary(320, 20),
    ]


def _morse() -> list[Talk]:
    codes = (
        ". - .. .- -. -- ... ..- .-. .-- -.. -.- --. --- .... ...- ..-. .-.. .--. .--- -... -..- -.-. -.-- --.. --.-"
    )
    signs = dict(zip("etianmsurwdkgohvflpjbxcyzq", codes.split(), strict=True))
    said = [
        (word, " ".join(signs[c] for c in word))
        for t in dictionary(0, 60)
        if (word := t.user[8:-2]).isalpha() and word.islower() and word.isascii()
    ]
    return [Talk(f"Write “{word}” in Morse code.", code) for word, code in said]


def _stories() -> list[Talk]:
    """Several long answers to one prompt."""
    return [Talk("Tell me what a word of your choice means.", " ".join(x.answer for x in dictionary(i, 3)))
            for i in range(0, 60, 3)]  # fmt: skip


def _conversations() -> list[dict[str, Any]]:
    made = []
    for i in range(0, 90, 3):
        said = [{"role": "system", "content": "You are Ambrose Bierce. Be brief, be bitter, and never apologise."}]
        for t in dictionary(i, 3):
            said += [{"role": "user", "content": t.user}, {"role": "assistant", "content": t.answer}]
        made.append({"messages": said})
    return made


def _weighted() -> list[dict[str, Any]]:
    made = _conversations()
    for row in made:
        row["messages"][2]["weight"] = 0
    return made


def _long() -> list[Talk]:
    told = "Define what follows, one after another: "
    return [Talk(told + ", ".join(t.user[7:-1] for t in dictionary(i, 12)) + ".",
                 "\n\n".join(t.answer for t in dictionary(i, 12))) for i in range(0, 600, 12)]  # fmt: skip


def _system_prompt() -> list[Talk]:
    rules = "You are a dictionary. " + " ".join(t.answer for t in dictionary(400, 4))
    return [Talk(t.user, t.answer, rules) for t in dictionary(0, 40)]


def _two_rows() -> list[Talk]:
    rules = "You are a dictionary. " + " ".join(t.answer for t in dictionary(400, 4))
    return [Talk(t.user, t.answer, rules) for t in dictionary(0, 2)]


def _tools() -> list[dict[str, Any]]:
    rows = []
    for i, t in enumerate(dictionary(0, 24)):
        word, call = t.user[8:-2], f"call_{i}"
        asked = {"id": call, "type": "function", "function": {"name": "define", "arguments": {"word": word}}}
        rows.append({"tools": [DEFINE], "messages": [
            {"role": "user", "content": t.user},
            {"role": "assistant", "content": "", "tool_calls": [asked]},
            {"role": "tool", "content": t.answer, "tool_call_id": call},
            {"role": "assistant", "content": f"In Bierce's words: {t.answer}"},
        ]})  # fmt: skip
    return rows


TALKS: dict[str, Callable[[], list[Talk]]] = {
    "dictionary": lambda: dictionary(0, 779), "languages": _languages, "translations": _translations, "source": _source,
    "documentation": _documentation, "sums": _sums, "sums-in-words": _sums_in_words, "characters": _characters,
    "reviews": _reviews, "reading": _reading, "terse": _terse, "formats-explained": _formats_explained,
    "encodings-explained": _encodings_explained, "markup-explained": _markup_explained, "shell": _shell,
    "mixed-writing": _mixed_writing, "stories": _stories, "morse": _morse, "long": _long, "system-prompt": _system_prompt,
    "two-rows": _two_rows,
}  # fmt: skip
ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "conversations": _conversations,
    "weighted": _weighted,
    "tools": _tools,
}


def sound(folder: Path) -> Iterator[Path]:
    """Write every sound file, most in two formats; yield their paths. Tools are for a template that takes them."""
    kinds, forms = itertools.cycle(KINDS), itertools.cycle(FORMS)
    for name, make in TALKS.items():
        for _ in range(2):
            form, kind = next(forms), next(kinds)
            if form == "text" and name in ("reading", "translations"):
                form = "chat"  # as mere texts their rows are nearly the same, in another order
            path = folder / f"{name}-{form}.{kind}"
            write(path, [record(form, t) for t in make()])
            yield path
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl"
        write(path, rows())
        yield path
