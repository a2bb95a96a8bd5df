"""One code for each language, from the codes and names that published sets use."""

import re

# Code: its English names and its other codes of ISO 639. An Arabic dialect keeps a code of its own.
_LANGUAGES = """
ar: arabic, modern standard arabic, standard arabic, msa, ara, arb, عربي, العربية
arz: egyptian, egyptian arabic, masri
ary: moroccan, moroccan arabic, darija, moroccan darija
arq: algerian, algerian arabic
aeb: tunisian, tunisian arabic
apc: levantine, levantine arabic, north levantine, north levantine arabic, ajp, south levantine arabic, lebanese, syrian
afb: gulf, gulf arabic, khaleeji, emirati
acm: iraqi, iraqi arabic, mesopotamian arabic
ars: najdi, najdi arabic, saudi, saudi arabic
acw: hijazi, hijazi arabic, hejazi
acq: taizzi-adeni arabic, yemeni, yemeni arabic
apd: sudanese, sudanese arabic
ayl: libyan, libyan arabic
am: amharic, amh
bg: bulgarian, bul
bn: bengali, bangla, ben
cs: czech, ces, cze
da: danish, dan
de: german, deutsch, deu, ger
el: greek, ell, gre
en: english, eng
es: spanish, spa, castilian
fa: persian, farsi, fas, per, pes
fi: finnish, fin
fr: french, fra, fre
ga: irish, gle
ha: hausa, hau
he: hebrew, heb, iw
hi: hindi, hin
hr: croatian, hrv
hu: hungarian, hun
id: indonesian, ind
ig: igbo, ibo
it: italian, ita
ja: japanese, jpn
jv: javanese, jav
ko: korean, kor
mn: mongolian, mon, khk
ms: malay, msa_my, may, zsm
nl: dutch, nld, dut
no: norwegian, nor, nb, nob
pl: polish, pol
pt: portuguese, por
ro: romanian, ron, rum
ru: russian, rus
rw: kinyarwanda, kin
si: sinhala, sin
so: somali, som
sr: serbian, srp
su: sundanese, sun
sv: swedish, swe
sw: swahili, swa, swh
ta: tamil, tam
te: telugu, tel
th: thai, tha
tr: turkish, tur
uk: ukrainian, ukr
ur: urdu, urd
vi: vietnamese, vie
yo: yoruba, yor
zh: chinese, mandarin, zho, chi, cmn, simplified chinese, traditional chinese
"""
CODES: dict[str, str] = {}
for _line in _LANGUAGES.strip().splitlines():
    _code, _, _names = _line.partition(": ")
    for _name in (_code, *_names.split(", ")):
        CODES[_name] = _code


def language_code(name: str) -> str:
    """The code of a language given by a code or an English name: script and region are left out.

    arz_Arab, ar-arz, Egyptian Arabic -> arz    en-US, eng_Latn, English -> en    zh-CN -> zh    ar_en -> ar-en

    A region is no dialect: ar-EG and ar-MA are what published programs call standard Arabic, so they give "ar". What
    is not known stays as it is, in small letters; nothing gives "und".
    """
    words = name.strip()
    small = " ".join(words.lower().replace("_", " ").replace("-", " ").split())
    if not small:
        return "und"
    if small in CODES:
        return CODES[small]
    tags = re.split(r"[-_]", words)
    first = CODES.get(tags[0].lower())
    if first and len(tags) > 1:
        second = CODES.get(tags[1].lower())
        if second and first == "ar" and tags[1].lower() in CODES and len(tags[1]) == 3:
            return second  # ar-arz: a dialect as an extended subtag
        if second and len(tags) == 2 and tags[1].islower() and len(tags[1]) < 4 and "en" in (first, second):
            return f"{first}-{second}"  # a pair, as parallel text is called
        return first
    if re.fullmatch(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*", words):
        return tags[0].lower()
    return small.replace(" ", "-")[:40]


def is_language(name: str) -> bool:
    """Whether a column of this name can hold text of that language: "ar", "eng_Latn", "English", not "text"."""
    words = name.strip().lower()
    return words in CODES or bool(
        re.fullmatch(r"[a-z]{2,3}[-_]([a-z]{4}|[a-z]{2})", words) and words[:3].strip("-_") in CODES
    )
