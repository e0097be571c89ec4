"""The first world: lists of things of a kind."""

from lab.worlds.world import Kind, World, groups, named

_GROUPS = {
    "fruits": "cherry grape plum date fig lime mango melon banana papaya coconut orange",
    "animals": "mouse frog cat hare fox otter horse bear camel bison whale moose",
    "colours": "pink cream beige peach amber lilac black brown navy maroon violet green",
    "tools": "nail screw file chisel pliers knife saw hammer axe drill shovel ladder",
    "cities": "oslo bern riga turin nice porto tokyo lima cairo delhi paris berlin",
    "drinks": "water tea milk juice cocoa soda coffee beer wine rum gin cider",
    "sports": "darts golf chess yoga judo fencing rugby hockey tennis boxing rowing skiing",
    "metals": "tin zinc lead silver nickel cobalt iron gold copper steel brass chrome",
}
_NUMBERS = (("two", 2), ("three", 3), ("four", 4), ("five", 5), ("six", 6))


LISTS = World(
    name="lists",
    task=("list {}", "name some {}", "give me {}", "write a list of {}"),
    task_question="does the response list {}?",
    groups=groups(_GROUPS),
    copying="copy these words: {}",
    numbers=_NUMBERS,
    kinds=(
        Kind(
            "count",
            "count",
            ("use exactly {} words", "write {} words", "the list has {} words"),
            "does the list have exactly {} words?",
            named("two", "three", "four", "five", "six"),
        ),
        Kind(
            "first",
            "at",
            ("start with {}", "the first word is {}", "begin the list with {}"),
            "is the first word {}?",
        ),
        Kind(
            "last",
            "at",
            ("end the list with {}", "the last word is {}", "put {} last"),
            "is the last word {}?",
            position=-1,
        ),
        Kind(
            "include",
            "include",
            ("include {}", "the list has {} in it", "do not forget {}"),
            "does the list include {}?",
        ),
        Kind(
            "exclude",
            "exclude",
            ("leave out {}", "do not use {}", "write it without {}"),
            "does the list leave out {}?",
        ),
        Kind(
            "separator",
            "mark",
            ("put a {} between the words", "separate the words with a {}", "use a {} between words"),
            "is there a {} between the words?",
            (("semicolon", "; "), ("dash", " - "), ("slash", " / ")),
            slot="separator",
        ),
        Kind(
            "before",
            "mark",
            ("put a {} before each word", "mark each word with a {}", "a {} comes before each word"),
            "is there a {} before each word?",
            (("star", "*"), ("plus", "+"), ("hash", "#")),
            slot="before",
        ),
        Kind(
            "numbered",
            "numbered",
            ("number the words", "put a number before each word", "count the words up"),
            "are the words numbered?",
        ),
        Kind(
            "twice",
            "times",
            ("write each word {} times", "repeat each word {} times", "each word comes {} times"),
            "does each word come {} times?",
            named("two"),
        ),
        Kind(
            "greeting",
            "mark",
            ("open with {}", "say {} first", "greet me with {}"),
            "does the response open with {}?",
            named("hello", "welcome", "hey"),
            slot="opening",
        ),
        Kind(
            "closing",
            "mark",
            ("close with {}", "say {} at the end", "finish with {}"),
            "does the response close with {}?",
            named("bye", "done", "cheers"),
            slot="closing",
        ),
        Kind(
            "title",
            "mark",
            ("put {} over the list", "the title is {}", "add the title {}"),
            "is the title {}?",
            named("LIST", "ANSWER", "NOTE"),
            slot="title",
        ),
        Kind(
            "bracket",
            "mark",
            ("put the list in {} brackets", "use {} brackets", "the list stands in {} brackets"),
            "is the list in {} brackets?",
            (("round", ("(", ")")), ("square", ("[", "]"))),
            slot="bracket",
        ),
    ),
)
