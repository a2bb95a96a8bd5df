"""What the tests of conversations share."""

from ain_jax.tokenizer.chat import CHATML_TEMPLATE

PLAIN_CHATML = CHATML_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
EACH = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]
