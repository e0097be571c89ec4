"""The second world: trips through regions. No setting is tuned on it."""

from lab.worlds.world import Kind, World, groups, named

_GROUPS = {
    "alps": "davos zermatt chur sion grindel andermatt innsbruck bolzano trento aosta chamonix annecy",
    "coast": "genoa savona rapallo levanto pisa livorno nizza antibes cannes toulon cassis marseille",
    "islands": "corfu naxos paros samos kos rhodes malta gozo capri ischia elba sardinia",
    "north": "bergen voss narvik tromso alta bodo lulea umea kiruna oulu kemi inari",
    "desert": "fez merzouga zagora tata agadir tiznit luxor siwa aswan petra aqaba wadi",
    "rivers": "passau linz melk vienna budapest mohacs cologne bonn koblenz mainz speyer basel",
}

TRIPS = World(
    name="trips",
    task=("plan a trip through the {}", "I travel to the {}", "show me a route in the {}"),
    task_question="is it a trip through the {}?",
    groups=groups(_GROUPS),
    copying="repeat after me: {}",
    halves=("quiet", "busy"),
    numbers=(("four", 4), ("five", 5), ("six", 6), ("seven", 7), ("three", 3)),
    separator=" then ",
    lengths=(3, 6),
    kinds=(
        Kind(
            "stops",
            "count",
            ("make {} stops", "I have time for {} stops", "{} stops in all"),
            "are there {} stops?",
            named("three", "four", "five", "six"),
            family="stops",
        ),
        Kind(
            "short",
            "maximum",
            ("never over {} stops", "{} stops is the limit", "keep it under or at {} stops"),
            "does it keep to the limit of {} stops?",
            named("three", "four"),
            family="stops",
        ),
        Kind(
            "long",
            "minimum",
            ("I want {} stops and up", "from {} stops on", "make it long with {} stops and up"),
            "does it make {} stops and up?",
            named("six", "seven"),
            family="stops",
        ),
        Kind(
            "depart",
            "at",
            ("I depart from {}", "leave from {}", "my journey begins in {}"),
            "does it depart from {}?",
        ),
        Kind(
            "second",
            "at",
            ("my second stop is {}", "go to {} as the second stop", "second comes {}"),
            "is the second stop {}?",
            position=1,
        ),
        Kind("via", "include", ("go via {}", "pass {} on the way", "visit {} too"), "does it go via {}?"),
        Kind("avoid", "exclude", ("avoid {}", "stay away from {}", "not by {}"), "does it avoid {}?"),
        Kind(
            "mood",
            "only",
            ("I like {} places", "pick {} places", "every stop is {}"),
            "is every stop {}?",
        ),
        Kind(
            "link",
            "mark",
            ("join the stops by {}", "between stops write {}", "link them with {}"),
            "are the stops joined by {}?",
            (("arrow", " > "), ("bar", " | "), ("dots", ": "), ("to", " to ")),
            slot="separator",
        ),
        Kind(
            "rating",
            "mark",
            ("give every stop a {}", "rate it with a {}", "add a {} to every stop"),
            "does every stop get a {}?",
            (("tick", "~"), ("percent", "%"), ("dollar", "$")),
            slot="after",
        ),
        Kind(
            "days",
            "numbered",
            ("show the day of every stop", "add the days", "say which day it is"),
            "does it show the days?",
        ),
        Kind(
            "wish",
            "mark",
            ("wish me {} at last", "part with {}", "my goodbye is {}"),
            "does it part with {}?",
            named("luck", "joy", "sunshine"),
            slot="closing",
        ),
        Kind(
            "note",
            "mark",
            ("below it note {}", "add the note {}", "on another line put {}"),
            "is the note {} below it?",
            named("map", "ticket", "passport"),
            slot="second_line",
        ),
    ),
)
