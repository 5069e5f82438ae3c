"""Fixed texts on which two forms of one tokenizer are compared."""

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, doesn't it? \"Yes,\" she said -- 'it does!'",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May; 1,234.56 + 0.5% of $99 is 3.14159e-10.",
    'def f(x):\n\treturn {"a": [x ** 2, None]}  # a comment\n\n\nif __name__ == "__main__":\n    f(10)\n',
    "  two leading spaces,   three inside, and one at the end ",
    "tabs\tand\r\nlines\n\n \n and a non-breaking\u00a0space",
    "naïve café — “quoted” … ½ ﬁne № 5 ２３ e\u0301",
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا नमस्ते",
    "emoji 🙂👩‍👩‍👧🇫🇷 and signs ∑∫√ ☃",
    "https://example.org/a_b?c=d&e=%20f#g AND CamelCaseWords snake_case_words SHOUTING",
    "aaaaaaaaaaaaaaaaaaaa ababababab 0000000000 ......... ----------",
)
