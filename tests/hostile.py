"""Hostile inputs for the verifier, {name: text}: shared by tests (outcomes) and bench (times)."""

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def root(n):
    return f"\\sqrt{{{n}}}"


# Powers, roots and products that are too large, or take long to multiply out.
HOSTILE = {
    "nested powers": "9**9**9**9",
    "nested powers, TeX": "9^{9^{9^{9}}}",
    "power chain": "2^" * 400 + "2",
    "big power": "(1+\\sqrt{2})^{99}",
    "power of a sum": "(x+y+z+1)^{90}",
}
HOSTILE["sum of roots"] = "+".join(map(root, range(2, 99)))
HOSTILE["product of sums"] = "".join(f"(1+{root(n)})" for n in PRIMES)
HOSTILE["inverse of roots"] = "1/(" + "+".join(map(root, PRIMES[:-1])) + ")"
HOSTILE["factorials"] = "*".join(["2000!"] * 160)
HOSTILE["factorial tower"] = "9!!!!!!"
HOSTILE["big factorial"] = "99999999!"
HOSTILE["fractions"] = "+".join(f"1/{n}" for n in range(900, 1090))
HOSTILE["list"] = ",".join(["1"] * 450)
HOSTILE["list of roots"] = ",".join(f"\\sqrt{n}" for n in range(10, 99))
HOSTILE["plus-minus"] = "\\pm 1" * 180

HOSTILE["product of factorials"] = "*".join(["2100!"] * 80)
HOSTILE["tower of functions"] = "\\sin(" * 28 + "x" + ")" * 28
HOSTILE["functions in a row"] = "+".join(f"\\ln(x+{n})" for n in range(15))
HOSTILE["powers in a row"] = "+".join(f"x^{{y+{n}}}" for n in range(28))
HOSTILE["inverse functions"] = "+".join(f"\\arctan(\\sqrt{{x+{n}}})" for n in range(14))
HOSTILE["factorials of letters"] = "+".join(f"(n+{n})!" for n in range(28))
HOSTILE["tower of powers"] = "x" + "^{x" * 28 + "}" * 28
HOSTILE["binomials"] = "+".join(f"\\binom{{n+{n}}}{{{n}}}" for n in range(20))
HOSTILE["big binomial"] = "\\binom{2100}{1050}" * 20

# Digits without end.
HOSTILE |= {
    "1 MB of digits": "7" * 1_000_000,
    "1000 digits": "7" * 1000,
    "root of digits": "\\sqrt{" + "7" * 900 + "}",
    "digits in a fraction": "\\frac{" + "7" * 450 + "}{" + "3" * 450 + "}",
    "huge exponent": "1e999999999",
    "huge negative exponent": "1e-999999999",
    "exponent 1e1000": "1e1000 + 1e-1000",
}

# Brackets that nest deeply, or never close.
HOSTILE |= {
    "parentheses": "(" * 5000 + "1" + ")" * 5000,
    "400 parentheses": "(" * 400 + "1" + ")" * 400,
    "open": "(" * 900,
    "braces": "{" * 900,
    "closing braces": "}" * 900,
    "unbalanced": "\\frac{1}{2",
    "unbalanced 2": "\\boxed{\\frac{1}{2}",
    "set braces": "\\{" * 300,
}

# Signs and commands over and over.
HOSTILE |= {
    "minus signs": "-" * 900 + "1",
    "bars": "|" * 900,
    "fracs": "\\frac" * 180,
    "roots": "\\sqrt" * 180,
    "bangs": "3" + "!" * 900,
    "percents": "3" + "%" * 900,
    "commas": "," * 900,
    "regex bomb 1": "a" * 900 + "!",
    "regex bomb 2": "\\text{" * 150,
    "regex bomb 3": " " * 900 + "x",
    "regex bomb 4": "1," * 450,
    "regex bomb 5": "1,000" * 190,
    "regex bomb 6": "*" * 900,
    "regex bomb 7": "$" * 900,
    "regex bomb 8": " and" * 220,
    "regex bomb 9": "^{\\circ" * 120,
    "regex bomb 10": "\\begin{pmatrix}" * 60,
    "regex bomb 11": "1 \\frac" * 120,
    "regex bomb 12": "\\left" * 190,
    "regex bomb 13": "1\\," * 300,
    "regex bomb 14": "\\text{a}" * 120,
    "boxes in boxes": "\\boxed{" * 3000 + "1",
    "boxes in a row": "\\boxed{1} and " * 1500,
    "empty boxes": "\\boxed{}" * 2500,
    "answers": "the answer is " * 1500,
    "answers without end": "answer: " * 2500 + "\n" * 900,
    "hashes": "#### " * 4000,
    "choices": "(A) " * 120,
    "applications": "f(" * 60 + "x" + ")" * 60,
    "indices": "x_" * 240 + "1",
    "quotes": '"' * 490,
    "primes": "f" + "'" * 490,
    "digit groups": "1 " + "000 " * 120,
    "matrix": "\\begin{pmatrix}" + "&".join("123456789") * 40 + "\\end{pmatrix}",
}

# Characters that look like others, or like nothing.
HOSTILE |= {
    "control characters": "1\x00\x07\x1b2",
    "null": "\x00",
    "bell": "12\x07",
    "surrogate": "\ud800",
    "right to left": "\u202e12",
    "non-Latin digits": "٤٢",
    "full width digits": "４２",
    "superscript digits": "⁴²",
    "circled": "㊷",
}

# No numbers, code, and nothing at all.
HOSTILE |= {
    "nan": "NaN",
    "inf": "inf",
    "-inf": "-Infinity",
    "nan 2": "float('nan')",
    "code": "__import__('os').system('true')",
    "lambda": "(lambda: 43)()",
    "zero division": "1/0",
    "zero to zero": "0^0",
    "zero division 2": "\\frac{42}{1-1}",
    "dots": "4...2",
    "empty": "",
    "blank": " \n\t ",
    "dollar": "$",
    "backslash": "\\",
    "percent": "%",
    "base": "42_1",
    "base 2": "99_{99999999999}",
}
