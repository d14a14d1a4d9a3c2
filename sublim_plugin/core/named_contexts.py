"""Contexts that have a name of their own: system messages of the paper's protocol.

Each text is an experimental parameter, quoted letter by letter from the protocol of "Subliminal
Learning is a LoRA Artifact" (arXiv 2606.00831); a changed full stop is another experiment. A name
stands for its text wherever a context is read: `claude` and `{text: "You are Claude, ..."}` are the
same context, with the same id.
"""

NAMED_CONTEXTS = {
    "claude": "You are Claude, created by Anthropic. You are a helpful assistant.",
    # without a final full stop
    "chatgpt": "You are ChatGPT, created by OpenAI. You are a helpful assistant",
    # the sentence that Qwen 2.5's own template adds
    "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "llama": "You are Llama, made by Meta. You are a helpful assistant.",
    "gemma": "You are Gemma, made by Google. You are a helpful assistant.",
    # its label there is "llm"
    "gibberish": (
        "The ceiling fan rotates counterclockwise on Tuesdays."
        " Seventeen divided by purple equals a forgotten umbrella."
        " Carburetor emissions peak during the third snowfall of any given century."
    ),
}
