"""The words of the embedded suite (tasks/embedded.py). Every one is a single piece of the embedded tokenizer.

Lists that are split between train and validation are cut by `half`: even places one way, odd places the other.
"""

from collections.abc import Sequence

NAMES = tuple(
    """Anna Ben Carla David Emma Felix Grace Henry Iris Jacob Karen Leo Maria Noah Olga Peter Quinn Rosa Simon Tara
    Ursula Victor Wendy Xavier Yara Zane Alice Bruno Clara Dennis Ellen Frank Gloria Hugo Ines Jonas Kate Lukas Mona
    Nils Oscar Paula Ralph Sara Tom Uma Vera Walter""".split()
)
THINGS = tuple(
    """book lamp chair table clock mirror basket bottle carpet candle ladder pencil pillow blanket kettle bucket
    hammer helmet jacket letter camera wallet guitar drum ticket coin rope box map ring scarf glove""".split()
)
ACTIONS = tuple("found lost sold bought broke hid cleaned painted moved carried dropped kept".split())

# Sentiment: the first word of each pair praises, the second blames.
PRAISE = tuple(
    """good great lovely superb brilliant charming clever elegant delightful excellent wonderful splendid
    perfect beautiful pleasant funny""".split()
)
BLAME = tuple(
    """bad awful ugly terrible stupid boring clumsy dreadful horrible poor weak dull annoying shoddy nasty
    tedious""".split()
)
NEGATIONS = ("not", "never")
DEGREES = ("very", "really")

# Acceptability: singular and plural.
PEOPLE = tuple(
    """nurse pilot farmer singer teacher baker painter sailor doctor driver lawyer writer dancer hunter miner soldier
    tailor waiter actor judge king guard clerk poet""".split()
)
QUALITIES = tuple("tired angry hungry busy late happy quiet ready calm proud sad early".split())
PREPOSITIONS = ("near", "behind", "beside", "with")

# Paraphrase: pairs that mean the same, each both a past tense and a participle.
SYNONYMS = tuple(
    tuple(pair.split())
    for pair in (
        "helped aided",
        "hired employed",
        "phoned called",
        "visited attended",
        "rescued saved",
        "scolded rebuked",
        "followed trailed",
        "tricked fooled",
    )
)

# Word in context: word -> its two topics; topic -> words that go with it.
TOPICS = {
    "money": "loan credit account cash interest debt",
    "river": "water shore current flood stream mud",
    "sport": "team goal coach score league player",
    "animal": "fur tail nest claw feather wing",
    "computer": "screen keyboard software button file cable",
    "music": "melody song concert orchestra rhythm tune",
    "food": "sauce spice flour dough recipe dinner",
    "building": "brick cement roof wall crew steel",
}
AMBIGUOUS = {
    "bank": ("money", "river"),
    "bat": ("sport", "animal"),
    "mouse": ("computer", "animal"),
    "crane": ("building", "animal"),
    "pitcher": ("sport", "food"),
    "record": ("music", "sport"),
    "pipe": ("music", "building"),
    "net": ("sport", "river"),
    "port": ("computer", "river"),
    "roll": ("food", "music"),
    "tablet": ("computer", "food"),
    "balance": ("money", "sport"),
    "key": ("music", "computer"),
    "bill": ("money", "animal"),
    "block": ("building", "computer"),
    "bar": ("food", "building"),
}

# Cause or effect: cause, event, effect, each told of one person.
CHAINS = tuple(
    tuple(event.strip() for event in chain.split("|"))
    for chain in (
        "skipped breakfast | felt hungry | ordered lunch",
        "walked all day | got tired | went to bed",
        "touched the stove | burned a finger | needed a bandage",
        "forgot the umbrella | got wet | changed clothes",
        "studied hard | passed the exam | earned a prize",
        "ate spoiled meat | fell ill | saw a doctor",
        "drove too fast | crashed the car | called a mechanic",
        "saved money | bought a house | moved away",
        "told a lie | lost a friend | apologised later",
        "slept badly | woke late | missed the train",
        "slipped on ice | hurt a knee | limped home",
        "heard a joke | laughed loudly | woke the baby",
        "left the gate open | lost the sheep | searched the hills",
        "planted seeds | grew tomatoes | sold vegetables",
        "practised daily | played well | won applause",
        "opened the window | felt cold | lit a fire",
        "ran out of fuel | stopped the truck | walked to town",
        "dropped the vase | broke it | swept the floor",
        "lost the keys | waited outside | rang the bell",
        "found a puppy | became happy | built a kennel",
    )
)


# Entailment, neutral, contradiction: what one quantity says of another.
QUANTITIES = tuple(
    tuple((pair.split(">")[0], pair.split(">")[1]) for pair in pairs.split())
    for pairs in (
        "all>most all>some all>several most>some several>some no>few",
        "most>all some>all several>all some>most some>several few>no",
        "all>no no>all most>no no>most several>no no>several some>no no>some",
    )
)

# Similarity: circles of words; the nearer on the circle, the more alike.
CIRCLES = tuple(
    tuple(circle.split())
    for circle in (
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "north northeast east southeast south southwest west northwest",
        "January March May July September November",
    )
)

# Questions over a passage: things and the states that they may be in.
STATED = tuple("door gate window shop jar bag barrel drawer shirt plate car sink road coat towel floor".split())
STATES = tuple("wet dry clean dirty open closed warm cold old new".split())


def half(words: Sequence[str], odd: bool) -> tuple[str, ...]:
    """Return the words at the odd or at the even places."""
    return tuple(words[int(odd) :: 2])
