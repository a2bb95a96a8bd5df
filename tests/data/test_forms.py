"""Each published form becomes the Record that it means, and each of its faults is told."""

import base64
import io
import json

import pytest
from PIL import Image

from ain_jax.data.files import Row
from ain_jax.data.formats import Message, Record, faults
from ain_jax.data.forms import FORMS, MAX_TEXT, columns, detect, to_record
from ain_jax.data.languages import language_code


def png(colour="red", size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


CAT, DOG = png("red"), png("blue")
USER, ANSWER = Message("user", "Hi"), Message("assistant", "Yes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("row")
    (path / "pictures").mkdir()
    (path / "pictures" / "cat.png").write_bytes(CAT)
    (path / "pictures" / "dog.jpg").write_bytes(DOG)  # a wrong ending: the contents decide
    (path / "frames").mkdir()
    (path / "frames" / "1.png").write_bytes(CAT)
    (path / "frames" / "2.png").write_bytes(DOG)
    (path / "film.mp4").write_bytes(b"\0" * 100)
    return path


def record(values, form="", folder="", **more) -> Record:
    found = detect(values)
    made = to_record(Row("a.jsonl:3", values, folder=str(folder)), form or found, "set", **more)
    assert form in ("", found)
    assert faults(made) == []
    return made


def told(values, form, folder="") -> str:
    with pytest.raises(ValueError) as error:
        to_record(Row("a.jsonl:3", values, folder=str(folder)), form, "set")
    assert str(error.value).startswith("a.jsonl:3: ")
    return str(error.value).removeprefix("a.jsonl:3: ")


def gpt(*turns):
    return [{"from": who, "value": words} for who, words in turns]


def chat(*turns):
    return [{"role": who, "content": words} for who, words in turns]


def said(made: Record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in made.messages]


# What becomes of each form


def test_plain_text():
    assert record({"text": "قطة", "meta": {}, "url": None}) == Record("a.jsonl:3", "set", "und", "text", text="قطة")
    assert record({"content": "a", "id": 7.0, "lang": "arb_Arab"}, "text") == Record("7", "set", "ar", "text", text="a")
    assert record({"text": "a", "language": None}, language="ar").language == "ar"
    assert record({"text": "a", "language": "English"}, language="ar").language == "en"


@pytest.mark.parametrize(
    "values, language",
    [
        ({"ar": "قطة", "en": "cat"}, "ar-en"),
        ({"id": 4, "en": "cat", "ar": "قطة"}, "ar-en"),
        ({"translation": {"en": "cat", "arz": "قطة"}}, "arz-en"),
        ({"translation": {"language": ["en", "ar"], "translation": ["cat", "قطة"]}}, "ar-en"),
        ({"source": "cat", "target": "قطة", "source_lang": "eng_Latn", "target_lang": "arb_Arab"}, "ar-en"),
        ({"src": "cat", "tgt": "قطة"}, "ar-en"),  # of the source's setting
        ({"eng_Latn": "cat", "ary_Arab": "قطة", "score": 0.5}, "ary-en"),
        ({"English": "cat", "Arabic": "قطة"}, "ar-en"),
    ],
)
def test_parallel_text(values, language):
    made = record(values, "parallel", language="ar-en")
    assert (made.language, made.kind) == (language, "parallel")
    assert sorted(made.text.split("\n")) == ["cat", "قطة"]


def test_the_order_of_the_sides_is_drawn_and_fixed():
    texts = [record({"id": i, "ar": "قطة", "en": "cat"}).text for i in range(64)]
    assert texts == [record({"id": i, "ar": "قطة", "en": "cat"}).text for i in range(64)]
    assert 16 < sum(text.startswith("cat") for text in texts) < 48


def test_alpaca():
    made = record(
        {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "Be brief.",
            "history": [["Hi", "Yes"]],
            "text": "Below is an instruction ...",  # as in the first published set
        },
        "alpaca",
    )
    assert said(made) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yes"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]
    assert said(record({"instruction": "Hi", "input": "", "output": "Yes", "history": None}, "alpaca")) == [
        ("user", "Hi"),
        ("assistant", "Yes"),
    ]
    assert record({"question": "Hi", "answer": "Yes"}, "alpaca").messages == (USER, ANSWER)


def test_instar():
    values = {"instruction": "Hi", "output": "Yes", "system": "", "task": "Closed QA", "topic": "x", "source": "y"}
    made = record(values | {"uuid": "u-1"}, "instar")
    assert made == Record("u-1", "set", "und", "closed_qa", messages=(USER, ANSWER))


def test_sharegpt(folder):
    made = record(
        {
            "conversations": gpt(
                ("human", "<image>Hi"), ("gpt", "A"), ("observation", "<image>"), ("function_call", "B")
            ),
            "images": ["pictures/dog.jpg", "pictures/cat.png"],
            "system": "Be brief.",
        },
        "sharegpt",
        folder,
    )
    roles = ("system", "Be brief."), ("user", "<image>Hi"), ("assistant", "A"), ("user", "<image>"), ("assistant", "B")
    assert said(made) == list(roles)
    assert made.images == (DOG, CAT)
    # As an Arrow table holds a list of objects, and as text.
    columns = {"from": ["human", "gpt"], "value": ["Hi", "Yes"]}
    assert record({"conversations": columns}).messages == (USER, ANSWER)
    assert record({"conversations": json.dumps(gpt(("human", "Hi"), ("gpt", "Yes")))}).messages == (USER, ANSWER)


def test_neighbours_of_a_role_are_joined_and_what_is_never_answered_goes():
    turns = chat(("system", " "), ("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e"))
    assert said(record({"messages": turns}, "messages")) == [("user", "a\nb"), ("assistant", "c\nd")]


def test_messages_of_parts(folder):
    url = "data:image/png;base64," + base64.b64encode(DOG).decode()
    parts = [
        {"type": "text", "text": "Look: ", "image": None},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": "pictures/cat.png"},
        {"type": "image", "image": {"bytes": DOG, "path": None}},
        {"type": "text", "text": "?"},
    ]
    made = record({"messages": chat(("user", parts), ("assistant", [{"type": "text", "text": "Yes"}]))}, "", folder)
    assert said(made) == [("user", "Look: <image><image><image>?"), ("assistant", "Yes")]
    assert made.images == (DOG, CAT, DOG)
    # Parts without their picture take the row's next one.
    turns = chat(
        ("user", [{"type": "image"}, {"type": "image", "image": CAT}, {"type": "image"}]), ("assistant", "Yes")
    )
    assert record({"messages": turns, "images": [DOG, CAT]}).images == (DOG, CAT, CAT)


@pytest.mark.parametrize(
    "asked, becomes",
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("What?<image>", "<image>\nWhat?"),
        ("<image>What?", "<image>\nWhat?"),
        ("What?", "<image>\nWhat?"),
        ("<image>", "<image>"),
    ],
)
@pytest.mark.parametrize("image", ["cat.png", ["cat.png"], {"path": "cat.png", "bytes": None}, {"bytes": CAT}])
def test_llava_wherever_the_picture_stands(folder, asked, becomes, image):
    values = {"id": 12, "image": image, "conversations": gpt(("human", asked), ("gpt", "A cat")), "language": "ar-EG"}
    made = record(values, "llava", images=str(folder / "pictures"))
    assert said(made) == [("user", becomes), ("assistant", "A cat")]
    assert (made.images, made.id, made.language) == ((CAT,), "12", "ar")


def test_llava_without_a_picture_and_with_several(folder):
    talk = gpt(("human", "Hi"), ("gpt", "Yes"))
    assert to_record(Row("x", {"conversations": talk}), "llava", "set").messages == (USER, ANSWER)
    talk = gpt(("human", "<image> or <image>?"), ("gpt", "Yes"))
    made = record({"conversations": talk, "image": ["pictures/cat.png", "pictures/dog.jpg"]}, "llava", folder)
    assert made.messages[0].content == "<image> or <image>?" and made.images == (CAT, DOG)


@pytest.mark.parametrize(
    "asked, more",
    [
        ("<video>\nWhat?", {"videos": [["frames/1.png", "frames/2.png"]]}),
        ("<video>\nWhat?", {"video": ["frames/1.png", "frames/2.png"]}),
        ("What?", {"video": ["frames/1.png", "frames/2.png"]}),
        ("<image>\nWhat?", {"video": "frames"}),  # as LLaVA-Video writes it
        ("<video>\nWhat?", {"videos": ["frames"]}),
    ],
)
def test_videos_are_lists_or_folders_of_frames(folder, asked, more):
    talk = gpt(("human", asked), ("gpt", "Yes"))
    made = record({"conversations": talk} | more, "", folder)
    assert made.messages[0].content == "<video>\nWhat?"
    assert made.videos == ((CAT, DOG),) and made.images == ()


def test_a_video_part_beside_a_picture(folder):
    parts = [{"type": "image", "image": DOG}, {"type": "video", "video": ["frames/1.png"], "fps": 2}]
    made = record({"messages": chat(("user", parts), ("assistant", "Yes"))}, "", folder)
    assert (made.messages[0].content, made.images, made.videos) == ("<image><video>", (DOG,), ((CAT,),))


PROMPT = chat(("user", "Hi"))
PAIR = Record("a.jsonl:3", "set", "und", "pair", messages=(USER, ANSWER), rejected="No")


@pytest.mark.parametrize(
    "values",
    [
        {"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"},
        {"question": "Hi", "chosen": "Yes", "rejected": "No", "system": ""},
        {"prompt": "Hi", "accepted": "Yes", "rejected": "No"},
        {
            "conversations": gpt(("human", "Hi")),
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        {"messages": PROMPT, "chosen": chat(("assistant", "Yes"))[0], "rejected": chat(("assistant", "No"))[0]},
        {"prompt": PROMPT, "chosen": chat(("assistant", "Yes")), "rejected": chat(("assistant", "No"))},
        {"chosen": PROMPT + chat(("assistant", "Yes")), "rejected": PROMPT + chat(("assistant", "No"))},
        # As ultrafeedback_binarized: the question twice, the better conversation once more.
        {
            "prompt": "Hi",
            "messages": PROMPT + chat(("assistant", "Yes")),
            "chosen": PROMPT + chat(("assistant", "Yes")),
            "rejected": PROMPT + chat(("assistant", "No")),
            "score_chosen": 8.5,
        },
    ],
)
def test_preference_pairs(values):
    assert record(values, "preference") == PAIR


def test_a_pair_about_a_picture(folder):
    values = {"conversations": gpt(("human", "Hi")), "images": ["pictures/cat.png"], "chosen": "Yes", "rejected": "No"}
    made = record(values, "preference", folder)
    assert (made.images, made.messages[0].content, made.rejected) == ((CAT,), "<image>\nHi", "No")


@pytest.mark.parametrize(
    "values, desirable",
    [
        ({"prompt": "Hi", "completion": "Yes", "label": True}, True),
        ({"prompt": "Hi", "completion": "Yes", "label": 0}, False),
        ({"prompt": PROMPT, "completion": chat(("assistant", "Yes")), "label": "false"}, False),
        ({"instruction": "Hi", "output": "Yes", "kto_tag": True}, True),
        ({"messages": PROMPT + chat(("assistant", "Yes")), "label": False}, False),
        ({"conversations": gpt(("human", "Hi"), ("gpt", "Yes")), "kto_tag": "true"}, True),
    ],
)
def test_single_answers_with_a_verdict(values, desirable):
    made = record(values, "kto")
    assert (made.messages, made.desirable, made.kind) == ((USER, ANSWER), desirable, "unpaired")


def test_captions(folder):
    made = record({"txt": "A cat", "__key__": "a/17", "__members__": {"a/17.jpg": CAT}}, "caption")
    assert (said(made), made.images, made.id) == ([("user", "<image>"), ("assistant", "A cat")], (CAT,), "a/17")
    assert record({"image": {"bytes": DOG}, "caption": ["A dog", "Dog"]}, "caption").images == (DOG,)


def test_pictures_among_the_members_of_a_tar():
    members = {"__members__": {"x/1.a.png": CAT, "x/1.b.png": DOG}, "__key__": "x/1"}
    talk = {"conversations": gpt(("human", "<image><image>"), ("gpt", "Yes"))}
    assert record(members | talk, "llava").images == (CAT, DOG)
    assert record(members | talk | {"images": ["1.b.png", "x/1.a.png"]}, "sharegpt").images == (DOG, CAT)


def test_our_own_form(folder):
    values = {"messages": chat(("user", "<image>"), ("assistant", "Yes")), "images": ["pictures/cat.png"], "kind": "k"}
    made = record(values | {"language": "arz", "source": "mine", "id": "r"}, "record", folder)
    assert (made.id, made.source, made.language, made.kind, made.images) == ("r", "mine", "arz", "k", (CAT,))
    made = record({"messages": PROMPT + chat(("assistant", "Yes")), "desirable": False}, "record")
    assert made.desirable is False
    assert "unknown key 'txt': did you mean 'text'?" in told({"txt": "a"}, "record")


# Names and languages


@pytest.mark.parametrize(
    "value, name",
    [(17, "17"), (17.0, "17"), ("x", "x"), (0, "0")]
    + [(value, "a.jsonl:3") for value in (None, float("nan"), True, " ", ["x"], 1e300, 2.5)],
)
def test_names_of_rows(value, name):
    assert record({"text": "a", "id": value}).id == name


@pytest.mark.parametrize(
    "name, code",
    [
        ("ar", "ar"), ("arb_Arab", "ar"), ("ara", "ar"), ("Arabic", "ar"), ("MSA", "ar"), ("ar-EG", "ar"),
        ("arz", "arz"), ("arz_Arab", "arz"), ("Egyptian Arabic", "arz"), ("ar-arz", "arz"), ("egyptian_arabic", "arz"),
        ("ary", "ary"), ("Darija", "ary"), ("Moroccan", "ary"), ("arq", "arq"), ("ajp", "apc"), ("العربية", "ar"),
        ("en-US", "en"), ("en_GB", "en"), ("English", "en"), ("eng_Latn", "en"), ("zh-CN", "zh"), ("zh_Hans", "zh"),
        ("cmn_Hans", "zh"), ("pt-BR", "pt"), ("ar-en", "ar-en"), ("en-ar", "en-ar"), ("arz_en", "arz-en"),
        ("es-AR", "es"), ("xh", "xh"), ("xho_Latn", "xho"), ("Old Norse", "old-norse"), (" ", "und"), ("", "und"),
    ],
)  # fmt: skip
def test_languages(name, code):
    assert language_code(name) == code


# What is wrong


TALK = gpt(("human", "<image>\nHi"), ("gpt", "Yes"))


@pytest.mark.parametrize(
    "form, values, fault",
    [
        ("text", {"text": " "}, "text is empty; expected text that is not blank"),
        ("text", {"text": ["a"]}, 'text = ["a"]: expected text'),
        ("text", {"body": None}, "no text or content or"),
        ("text", {"text": "see <image>"}, '1 "<image>" but 0 pictures'),
        ("text", {"text": "half \ud800"}, "half of a surrogate pair in 'half \\ud800'"),
        ("text", {"text": "a" * (MAX_TEXT + 1)}, "4,194,305 characters of text; at most 4,194,304 are read"),
        ("parallel", {"ar": "قطة"}, "two sides are expected, as {'ar': ..., 'en': ...} or source and target; found ar"),
        ("parallel", {"ar": "قطة", "en": ""}, "en is empty"),
        ("parallel", {"ar": "قطة", "en": 3}, "en = 3: expected text"),
        ("parallel", {"translation": {"ar": "a", "en": "b", "fr": "c"}}, "found ar, en, fr"),
        ("alpaca", {"instruction": "Hi"}, "no output or response or completion or answer"),
        ("alpaca", {"instruction": "Hi", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": "", "output": ""}, "instruction is empty; expected text that is not blank; output"),
        ("alpaca", {"instruction": "Hi", "output": "a", "history": [["x"]]}, 'history[0] = ["x"]: expected [qu'),
        ("alpaca", {"instruction": "Hi", "output": "a", "history": [["x", ""]]}, "history[0]: an empty answer"),
        ("sharegpt", {"conversations": []}, "conversations = []: expected a list of turns"),
        ("sharegpt", {"conversations": "Hi"}, 'conversations = "Hi": expected a list of turns'),
        ("sharegpt", {"conversations": ["Hi"]}, 'conversations[0] = "Hi": expected an object with'),
        ("sharegpt", {"conversations": gpt(("humn", "Hi"), ("gpt", "a"))}, 'conversations[0]: role "humn"; expected '),
        ("sharegpt", {"conversations": gpt(("human", "Hi"), ("gpt", " "))}, "conversations[1]: an empty answer"),
        ("sharegpt", {"conversations": gpt(("human", "Hi"))}, "no assistant turn with content"),
        ("sharegpt", {"conversations": gpt(("gpt", "Hi"))}, "message 0: role 'assistant'; expected 'user'"),
        ("sharegpt", {"conversations": TALK}, '1 "<image>" but 0 pictures; each picture needs one'),
        ("sharegpt", {"conversations": TALK, "images": [CAT, CAT]}, '1 "<image>" but 2 pictures'),
        ("sharegpt", {"conversations": TALK * 2, "images": [CAT]}, '2 "<image>" but 1 picture;'),
        ("sharegpt", {"conversations": TALK, "images": [CAT], "tools": "[{}]"}, "tools are not read"),
        ("sharegpt", {"conversations": [*TALK, *TALK[:1]], "images": [CAT, CAT]}, "the last turn shows a picture"),
        ("messages", {"messages": chat(("user", "Hi"), ("assistant", None))}, "messages[1]: an empty answer"),
        ("messages", {"messages": chat(("user", 3), ("assistant", "a"))}, "messages[0]: content = 3: expected text"),
        ("messages", {"messages": chat(("user", [{"type": "audio"}]))}, 'messages[0], part 0: type "audio"; expected'),
        ("messages", {"messages": [PROMPT[0], ANSWER.__dict__ | {"weight": 0}]}, "messages[1]: weight 0 is not read"),
        ("messages", {"messages": [PROMPT[0], {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls are not read"),
        ("llava", {"conversations": TALK, "image": "kat.png"}, "no picture 'kat.png' in "),
        ("llava", {"conversations": TALK, "image": "pictures/kat.png"}, "did you mean 'cat.png'?"),
        ("llava", {"conversations": TALK, "image": "https://x.org/a.png"}, "nothing is fetched from the web"),
        ("llava", {"conversations": TALK, "image": "data:image/png;base64,@@"}, "a broken data: URL"),
        ("llava", {"conversations": TALK, "image": 7}, "picture 7: expected a path, a data: URL"),
        ("llava", {"conversations": TALK, "image": "a\0b"}, "a\\x00b"),
        ("llava", {"conversations": TALK, "image": "x" * 5000}, "xxx...'"),
        ("llava", {"conversations": TALK, "image": CAT[:48]}, "picture of 48 bytes: broken picture"),
        ("llava", {"conversations": TALK, "image": "film.mp4"}, "bytes that begin with b'\\x00"),
        ("llava", {"conversations": TALK, "video": "film.mp4"}, "video 'film.mp4': "),
        ("llava", {"conversations": TALK, "video": "nowhere"}, "no such folder in "),
        ("llava", {"conversations": TALK, "video": "https://x.org/frames"}, "no such folder in "),
        ("llava", {"conversations": TALK, "video": "ftp://x.org/a.mp4"}, "files at ftp:// cannot be reached"),
        ("llava", {"conversations": TALK, "image": "ftp://x.org/a.png"}, "files at ftp:// cannot be reached"),
        ("llava", {"conversations": TALK, "videos": [[CAT, png(size=(4, 4))]]}, "frame 1 has 4 x 4 pixels"),
        ("llava", {"conversations": TALK, "videos": [[]]}, "expected a list of its frames as pictures"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "a"}, "equals the better one"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": " "}, "rejected is empty"),
        ("preference", {"prompt": "Hi", "chosen": "a"}, "no rejected"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no question; expected one of instruction, prompt"),
        ("preference", {"prompt": "Hi", "chosen": PROMPT, "rejected": "b"}, "chosen ends with a turn of the user"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "<image>"}, "an answer cannot hold a picture"),
        (
            "preference",
            {"chosen": PROMPT + chat(("assistant", "a")), "rejected": chat(("user", "Ho"), ("assistant", "b"))},
            "chosen has 2 turns of its own and rejected 2; expected them to differ in the last answer alone",
        ),
        ("preference", {"prompt": "Ho", "chosen": PROMPT * 1 + chat(("assistant", "a")),
                        "rejected": PROMPT + chat(("assistant", "b"))}, "the turns before the answers differ"),
        ("kto", {"prompt": "Hi", "completion": "a", "label": "maybe"}, 'label = "maybe": expected true or false'),
        ("kto", {"prompt": "Hi", "completion": "a"}, "label = null: expected true or false"),
        ("caption", {"image": CAT, "caption": ""}, "caption is empty"),
        ("caption", {"caption": "a"}, '1 "<image>" but 0 pictures'),
    ],
)  # fmt: skip
def test_each_fault_is_told(folder, form, values, fault):
    assert fault in told(values, form, folder)


def test_all_faults_of_a_row_are_told_at_once(folder):
    message = told(
        {"conversations": [*TALK, {"from": "x"}], "images": ["a.png", "b.png"], "tools": "x"}, "llava", folder
    )
    assert [part in message for part in ("'a.png'", "'b.png'", 'role "x"', "tools are not read")] == [True] * 4


def test_a_row_that_could_not_be_read_is_told():
    with pytest.raises(ValueError, match="^a.jsonl:3: not JSON$"):
        to_record(Row("a.jsonl:3", None, "not JSON"), "text", "set")
    with pytest.raises(ValueError, match="form 'sharegtp': no such form; did you mean 'sharegpt'?"):
        to_record(Row("a.jsonl:3", {"text": "a"}), "sharegtp", "set")


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"foo": 1, "bar": None},
            "the keys foo are those of no known form; name the form. Each wants:\n  text: text\n",
        ),
        ({}, "the keys (none) are those of no known form"),
        ({"text": "a", "messages": PROMPT}, "the keys messages, text may be messages or text; name the form"),
        ({"conversations": [], "messages": []}, "may be sharegpt or messages"),
    ],
)
def test_unknown_and_ambiguous_keys_are_told(values, message):
    with pytest.raises(ValueError) as error:
        detect(values)
    assert message in str(error.value)
    assert all(f"\n  {form}: " in str(error.value) for form in FORMS)


def test_the_columns_of_a_form():
    assert {"instruction", "output", "id", "image"} <= columns("alpaca")
    assert "chosen" not in columns("alpaca")
    assert {"ar", "eng_Latn"} <= columns("parallel", ("ar", "eng_Latn", "score"))
    assert "score" not in columns("parallel", ("ar", "eng_Latn", "score"))


def test_a_prompt_that_repeats_the_end_of_the_conversation_loses_none_of_it(folder):
    talk = chat(("system", "In Arabic."), ("user", "In summer?"), ("assistant", "Hot."), ("user", "In winter?"))
    answers = {
        "chosen": talk + chat(("assistant", "Mild.")),
        "rejected": talk + chat(("assistant", "Purple.")),
    }
    expected = tuple(Message(turn["role"], turn["content"]) for turn in answers["chosen"])
    for asked in ("In winter?", talk[1:], talk[3:], talk):
        assert record(answers | {"prompt": asked}, "preference").messages == expected, asked
    own = {"system": "In Arabic.", "prompt": "In winter?"}
    short = {"chosen": answers["chosen"][3:], "rejected": answers["rejected"][3:]}
    assert record(own | short, "preference").messages == (expected[0], *expected[3:])
    assert record({"system": "In Arabic."} | short, "preference").messages == (expected[0], *expected[3:])
    longer = {"chosen": answers["chosen"][1:], "rejected": answers["rejected"][1:]}
    assert record(own | longer, "preference").messages == expected
    differs = answers | {
        "prompt": talk[:1] + chat(("user", "In autumn?"), ("assistant", "Hot."), ("user", "In winter?"))
    }
    assert "the turns before the answers differ from the prompt" in told(differs, "preference")
    assert "differ from the prompt" in told(answers | {"system": "In English.", "prompt": "In winter?"}, "preference")


def test_pairs_show_the_pictures_of_their_own_turns(folder):
    def asked(name):
        shown = {"type": "image", "image": f"pictures/{name}"}
        return [{"role": "user", "content": [shown, {"type": "text", "text": "What?"}]}]

    answers = {name: asked("cat.png") + chat(("assistant", name)) for name in ("chosen", "rejected")}
    assert record(answers, "preference", folder).images == (CAT,)
    assert record(answers | {"prompt": asked("cat.png")}, "preference", folder).images == (CAT,)
    other = answers | {"rejected": asked("dog.jpg") + chat(("assistant", "rejected"))}
    assert "expected them to differ in the last answer alone" in told(other, "preference", folder)


def test_an_empty_column_hides_no_filled_one(folder):
    values = {"instruction": "Q", "input": "", "context": "A passage", "output": "A"}
    assert record(values).messages[0].content == "Q\nA passage"
    values = {"images": [], "image": "pictures/cat.png", "messages": chat(("user", "<image>Hi"), ("assistant", "Yes"))}
    assert record(values, folder=folder).images == (CAT,)
    assert "output is empty" in told({"instruction": "Q", "output": " ", "answer": ""}, "alpaca")


def test_two_questions_in_one_row_are_refused():
    values = {"instruction": "Answer the question.", "question": "What is 1 + 1?", "answer": "2"}
    assert "instruction and question hold different questions; join them" in told(values, "alpaca")
    whole = {"instruction": "Add 1.", "prompt": "Below is a task.\nAdd 1.\nResponse:", "output": "2"}
    assert record(whole, "alpaca").messages[0].content == "Add 1."


def test_a_turn_without_its_words_names_what_it_holds():
    values = {"messages": [{"role": "user", "text": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    assert "messages[0]: no 'content' beside 'role'; the turn holds role, text" in told(values, "messages")


def test_a_label_beside_a_conversation_is_a_verdict_where_it_says_one():
    assert detect({"messages": PROMPT, "label": "sports"}) == "messages"
    assert detect({"messages": PROMPT, "label": "Good"}) == detect({"messages": PROMPT, "label": 0}) == "kto"
    assert detect({"prompt": "Hi", "completion": "Yes", "label": "odd"}) == "kto"
