"""Chat templates of our own writing, with the structures of those that can think.

`TINY`'s has none of them. Each is made of parts; what the real ones do is said beside the part.
"""

SYSTEM = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + EFFORT + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
"""
USER = """
{%- for message in messages if message.role == 'user' %}
    {%- set text = namespace(value='') %}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}
            {%- set text.value = text.value + '<|vision_start|><|image_pad|><|vision_end|>' %}
        {%- else %}
            {%- set text.value = text.value + part.text %}
        {%- endif %}
    {%- endfor %}
    {{- '<|im_start|>user\\n' + text.value|trim + '<|im_end|>\\n' }}
{%- endfor %}
"""
# Only the last answer keeps its thinking, here none.
ANSWER = """
{%- if messages[-1].role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' + BEFORE_ANSWER + messages[-1].content + '<|im_end|>\\n' }}
{%- endif %}
"""
GENERATION = """
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if IS_OFF %}
        {{- CLOSED }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""
CLOSED = "'<think>\\n\\n</think>\\n\\n'"
# Conditions for not thinking, by the switch that a template has.
BY_ENABLE_THINKING = "enable_thinking is defined and enable_thinking is false"
BY_THINKING = "thinking is defined and thinking is false"
BY_EFFORT = "reasoning_effort is defined and reasoning_effort == 'none'"


def thinking_template(is_off, effort="''", closed=CLOSED, before_answer=CLOSED):
    """A template that trims the user's text and has a default system prompt.

    `is_off`: its condition for not thinking. As expressions, too: `effort` before the system's
    text, the `closed` block of a prompt without thinking, and what it has `before_answer`.
    """
    template = SYSTEM + USER + ANSWER + GENERATION
    for part, expression in {
        "EFFORT": effort,
        "BEFORE_ANSWER": before_answer,
        "IS_OFF": is_off,
        "CLOSED": closed,
    }.items():
        template = template.replace(part, expression)
    return template.strip()


# As Qwen3.5 has it from 4B on.
THINKS_BY_DEFAULT = thinking_template(BY_ENABLE_THINKING)
