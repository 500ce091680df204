"""Man pages (roff with man or mdoc macros): paragraphs, definitions, examples and tables under their sections.

Not a formatter: reads only text, including the arguments of unknown macros, and ignores formatting requests.
"""

import re
import sys

from ingest.parse.blocks import BlockWriter
from ingest.parse.text import read_text
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "text/troff"
_MAX_STRING = 1000  # strings may contain others, recursively
_NAME = r"(?:\(..|\[[^\]\n]*\]|.)"
_ESCAPE = re.compile(
    rf"\\(?:[fFgkmMnVY][+-]?{_NAME}|s[+-]?(?:\(..|\[[^\]\n]*\]|'[^'\n]*'|[1-3]?\d)|[ABDHLNRSXZbhlovwx]'[^'\n]*'|"
    rf"\*(?P<string>{_NAME})|(?P<char>{_NAME})|$)"
)
_CHARS = dict(zip("-e ~0'`t\\.", "-\\   '`\t\\.", strict=True)) | {
    **{"aq": "'", "dq": '"', "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "bu": "•", "em": "—", "en": "–", "co": "©"},
    **{"hy": "-", "mi": "-", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "rg": "®", "tm": "™", "mu": "×"},
    **{"->": "→", "<-": "←", ">=": "≥", "<=": "≤", "+-": "±", "at": "@", "sh": "#", "Do": "$", "or": "|", "ba": "|"},
    **{":o": "ö", ":a": "ä", ":u": "ü", "ss": "ß", "'e": "é", "`e": "è", ",c": "ç", "de": "°", "<<": "«", ">>": "»"},
}
_names = re.compile(r"\S+").findall
_LINE = re.compile(r"[.'][ \t]*(\\.|[^\s\\]*)[ \t]*(.*)")  # of a macro
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)')
_CONDITION = re.compile(r"(!?)(n\b|t\b|\([^)]*\)|\\n\(..|[^\s\\]+)\s*(.*)")
_STARTS_LITERAL, _ENDS_LITERAL = {"nf", "EX", "Vb", "Bd", "TS"}, {"fi", "EE", "Ve", "Ed", "TE", "SH"}
_BREAKS = {
    *(*_STARTS_LITERAL, *_ENDS_LITERAL),
    *_names("PP P LP HP Pp TP sp RS RE IP It Bl El Dl D1 SY YS SH Sh SS Ss"),
}
_NO_TEXT = _BREAKS - {"Dl", "D1", "SY"} | {
    *_names(
        "ad hy nh na ne nr in ti ta so tr IX PD AT UC DT ll ft ps vs rm rr pl fam char mso do tm cs ev bp ce ul lf"
    ),
    *_names("als Os Dd Rs Re Bk Ek hw ss ec eo cc po rn wh warn nop Sm"),
}
_AROUND = {"Op": "[]", "Dq": "“”", "Qq": '""', "Sq": "‘’", "Pq": "()", "Bq": "[]", "Brq": "{}", "Aq": "<>", "Ql": "‘’"}
_EDGES = {"Oo": "[", "Oc": "]", "Do": "“", "Dc": "”", "So": "‘", "Sc": "’", "Po": "(", "Pc": ")", "Fl": "-", "Nd": "– "}
_CALLED = {*_names("Ad An Ar Cd Cm Dv Em Er Ev Fa Fn Ft Ic In Li Lk Mt Nm No Pa St Sx Sy Va Vt Xo Xc Xr It Dl D1")}
_PUNCTUATION = set(".,:;)]?!”’")


def parse_man_page(data: bytes) -> ParsedDocument:
    """Read the page; its title is like "ls(1)". Raises ParseError undecodable_text, output_too_large."""
    reader = _Reader()
    for line in re.sub(r"(?<!\\)\\(?:#.*)?\n", "", read_text(data)).split("\n"):
        if not re.match(r"[.'][ \t]*(?:\\[\"#]|$)", line):
            rest = reader.read(re.sub(r"(?<!\\)\\\".*", "", line))
            while rest:
                rest = reader.read(rest)
    return reader.writer.finish(MEDIA_TYPE, title=reader.title)


class _Reader:
    def __init__(self) -> None:
        self.writer, self.title = BlockWriter(), ""
        self._strings, self._name, self._is_mdoc = {"R": "®", "Tm": "™", "lq": "“", "rq": "”"}, "", False
        self._defines, self._held, self._depth = False, True, 0  # depth: nesting in a false conditional
        self._literal, self._is_tag, self._level = False, False, 0  # state for the next line
        self._table, self._between = "", "\t"  # "format" until its rows begin, then "rows"; cell separator

    def read(self, line: str) -> str:
        """Process a line; returns what must be read next, if it is a conditional."""
        name, rest = found.groups() if (found := _LINE.match(line)) else ("", line)
        if self._defines:
            self._defines = name != "."
        elif self._depth:
            self._depth = max(0, self._depth + line.count(r"\{") - line.count(r"\}"))
        elif name:
            return self._command(name, rest.strip())
        elif self._table == "format":
            self._table = "rows" if line.rstrip().endswith(".") else "format"
            self._between = found[1] if (found := re.search(r"tab *\((.)\)", line)) else self._between
        else:
            self._write(self._plain(line.replace(r"\}", "")), line.endswith(r"\c"))
        return ""

    def _command(self, name: str, rest: str) -> str:
        if name in ("if", "ie", "el"):
            return self._decide(name, rest)
        rest = rest.replace(r"\}", "").strip()
        words = [self._plain(quoted.replace('""', '"') or bare) for quoted, bare in _ARGUMENT.findall(rest)]
        if name in _BREAKS:
            self.writer.end_block()
        if name in _STARTS_LITERAL | _ENDS_LITERAL:
            self._literal = name in _STARTS_LITERAL and "-filled" not in words
            self._table = "format" if name == "TS" else ""
        match name:
            case "de" | "de1" | "am" | "ig":
                self._defines = True
            case "ds":
                key, _, value = rest.partition(" ")
                self._strings[key] = self._plain(value.strip().removeprefix('"'))[:_MAX_STRING]
            case "TH" | "Dt":
                self._is_mdoc = name == "Dt"
                self.title = f"{words[0]}({words[1]})".lower() if len(words) > 1 else ""
            case "SH" | "Sh" | "SS" | "Ss":
                self._level = 1 if name.lower() == "sh" else 2
                self._write(" ".join(words))
            case "TP" | "TQ" | "br":
                self.writer.end_line()
                self._is_tag = name != "br"
            case "IP" | "It":
                tag = self._read_mdoc(words) if name == "It" else "".join(words[:1])
                self._is_tag = len(tag) > 2  # not a bullet or a number
                self._write(tag)
            case _ if name not in _NO_TEXT and name[0] != "\\" and (words or self._is_mdoc):
                joint = "" if name in ("BR", "BI", "RB", "RI", "IR", "IB", "SB") else " "  # fonts that alternate
                self._write(self._read_mdoc([name, *words]) if self._is_mdoc else joint.join(words))
        return ""

    def _decide(self, name: str, rest: str) -> str:
        """The rest of a conditional line, if the condition is true for terminal output."""
        if name == "el":
            applies = not self._held
        elif (found := _CONDITION.match(rest)) is None:
            return ""
        else:
            rest = found[3]
            self._held = applies = (found[2] in ("n", r"\n(.g")) != bool(found[1])
        self._depth = 0 if applies else max(0, rest.count(r"\{") - rest.count(r"\}"))
        return re.sub(r"\\[{}]", "", rest).strip() if applies else ""

    def _write(self, text: str, goes_on: bool = False) -> None:
        if self._level and text.strip():
            self.writer.add(text)
            self.writer.end_heading(self._level)
            self._level = 0
            return
        if self._table:
            cells = [cell.strip() for cell in re.sub(r"T[{}]", "", text).split(self._between)]
            text = " | ".join(cell for cell in cells if cell.strip("_="))
        if not text.strip():
            self.writer.end_block()
        elif not goes_on and (self._literal or self._is_tag or text[0].isspace()):
            self.writer.end_line()
            self.writer.add_line(text.rstrip() if self._literal else " ".join(text.split()))
        else:
            self.writer.add(text if goes_on else text + " ")
        self._is_tag = self._is_tag and not text.strip()

    def _plain(self, text: str) -> str:
        return _ESCAPE.sub(self._replace, text)

    def _replace(self, escape: re.Match[str]) -> str:
        if escape[0].startswith("\\h"):
            return " "
        name = escape["string"] or escape["char"] or ""
        name = name[1:].rstrip("]") if len(name) > 1 else name
        if re.fullmatch("u[0-9A-F]{4,6}", name) and int(name[1:], 16) <= sys.maxunicode:
            return chr(int(name[1:], 16))
        return (self._strings if escape["string"] else _CHARS).get(name, "")

    def _read_mdoc(self, words: list[str]) -> str:
        """The text of a line of mdoc macros, which can call each other."""
        behind, said, sticks = "", "", True
        while len(words) > 1 and words[-1] in _PUNCTUATION and words[-2] not in _AROUND:
            behind = words.pop() + behind
        for number, word in enumerate(words):
            after = words[number + 1] if number + 1 < len(words) else ""
            if word == "Nm" and (not after or after in _CALLED | _EDGES.keys() | _AROUND.keys()):
                word = self._name
            elif word == "Nm":
                self._name = self._name or after
            if word in _CALLED or word == "Ns":
                sticks = sticks or word == "Ns"
                continue
            if opens := word in _EDGES or word in _AROUND:
                behind = _AROUND.get(word, "  ")[1].strip() + behind
                word = _EDGES.get(word) or _AROUND[word][0]
            elif "Xr" in words[max(0, number - 2) : number - 1]:
                word, sticks = f"({word})", True
            said += word if sticks or word in _PUNCTUATION else f" {word}"
            sticks = opens and word not in _PUNCTUATION
        return said + behind
