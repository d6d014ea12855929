"""Words of the skill tasks: categories, synonyms, opposites, forms, scales, events. The suite has its own lists."""

CATEGORIES = {
    name: tuple(members.split())
    for name, members in {
        "colour": "red blue green yellow white black brown grey purple pink scarlet crimson",
        "animal": "dog cat horse cow sheep goat pig lion tiger bear wolf fox rabbit deer monkey elephant camel donkey",
        "bird": "eagle sparrow robin crow owl swan duck goose hen dove hawk lark parrot pigeon",
        "fruit": "apple pear plum cherry grape peach melon lemon orange fig strawberry",
        "food": "bread cheese butter meat soup cake pudding bacon ham pie potato rice",
        "drink": "tea coffee milk wine beer brandy ale cider cocoa lemonade",
        "part of the body": "arm leg hand foot head neck knee elbow shoulder finger toe chin cheek",
        "relative": "mother father sister brother aunt uncle cousin nephew niece daughter son grandmother grandfather",
        "piece of clothing": "coat hat shoe boot shirt gown dress cap cloak apron stocking waistcoat trousers",
        "piece of furniture": "table chair bed sofa desk stool bench cupboard wardrobe bookcase",
        "metal": "iron gold silver copper lead tin brass bronze steel",
        "tree": "oak elm pine willow birch ash maple beech cedar poplar",
        "flower": "rose lily daisy violet tulip poppy primrose daffodil bluebell snowdrop",
        "kind of weather": "rain snow wind storm fog hail frost thunder mist sunshine",
        "vehicle": "cart carriage wagon train ship boat coach bicycle sledge cab",
        "tool": "hammer saw axe spade knife rake chisel file needle shovel",
        "feeling": "anger joy fear grief pride shame envy hope sorrow delight",
        "country": "France Spain Italy Germany Russia Greece Egypt India China Holland",
        "building": "house church castle barn tower palace cottage hospital prison temple",
        "game": "chess cricket tennis football golf billiards whist croquet",
        "insect": "ant bee wasp fly moth beetle butterfly spider flea",
        "unit of time": "second minute hour day week month year century",
        "musical instrument": "piano violin flute harp drum guitar trumpet organ fiddle",
        "kind of land or water": "hill mountain valley river lake sea island forest desert plain",
    }.items()
}

KIND = tuple(
    """admirable agreeable amiable amusing attractive beloved blessed brave bright capable cheerful comfortable
    courteous delicious devoted earnest faithful fair fine fortunate friendly generous gentle glad glorious graceful
    gracious grand grateful happy healthy helpful honest hopeful innocent interesting jolly joyful just kind loyal
    magnificent merry neat nice noble patient peaceful pleasing polite pretty prosperous pure radiant rich safe sincere
    skilful sweet tender thoughtful useful valuable virtuous welcome wise witty worthy lucky handsome""".split()
)
UNKIND = tuple(
    """abominable absurd angry bitter brutal careless cowardly cruel dangerous deadly dirty disagreeable dishonest
    dismal disgusting dreary evil faithless false fatal fearful fierce filthy foolish frightful ghastly gloomy greedy
    grim guilty harmful harsh hateful hideous hopeless hostile ignorant impatient impudent inferior insolent jealous
    lazy loathsome lonely malicious mean miserable monstrous mournful offensive painful pitiful rotten rude sad savage
    selfish shabby shameful sick silly sinister spiteful sulky tiresome treacherous troublesome ungrateful unhappy
    unjust unpleasant useless vain vicious vile violent vulgar wicked worthless wretched wrong""".split()
)
ROLES = tuple(
    """man woman boy girl story tale song speech journey dinner house garden visit plan friend neighbour evening
    party idea answer place town village play picture room voice walk concert guest master servant summer""".split()
)

#: Pairs that mean nearly the same, by part of speech; no word stands in two pairs.
SYNONYMS = {
    part: tuple(tuple(pair.split("=")) for pair in pairs.split())
    for part, pairs in {
        "adjective": """big=large small=little quick=rapid glad=happy rich=wealthy brave=courageous angry=furious
            ill=sick silly=foolish strange=odd difficult=hard weary=tired right=correct famous=celebrated silent=mute
            sure=certain calm=tranquil polite=courteous lonely=solitary evident=obvious huge=enormous scared=afraid
            entire=whole true=genuine peculiar=singular sad=sorrowful clever=intelligent pretty=beautiful
            dreadful=terrible""",
        "noun": """journey=voyage error=mistake reply=answer wish=desire street=road forest=wood enemy=foe gift=present
            anger=rage fear=terror joy=delight sorrow=grief aim=purpose start=beginning end=finish shop=store
            stone=rock ship=vessel noise=sound boy=lad girl=maiden house=dwelling liberty=freedom riches=wealth
            talk=conversation strength=force pain=ache robber=thief garment=robe tale=story""",
        "verb": """begin=commence shut=close speak=talk weep=cry seek=search receive=obtain permit=allow purchase=buy
            vanish=disappear reply=answer fear=dread love=adore leap=jump pull=drag gather=collect hurry=hasten
            assist=support build=construct conceal=hide depart=leave perish=die demand=request remain=stay
            forgive=pardon believe=think comprehend=understand seize=grasp select=choose toss=throw repair=mend
            loathe=hate""",
    }.items()
}
OPPOSITES = {
    part: tuple(tuple(pair.split("/")) for pair in pairs.split())
    for part, pairs in {
        "adjective": """big/small hot/cold old/young rich/poor high/low long/short early/late wet/dry clean/dirty
            open/closed warm/cool full/empty strong/weak light/dark thick/thin wide/narrow loud/quiet happy/sad
            hard/soft fast/slow easy/difficult deep/shallow sweet/sour right/wrong near/far alive/dead safe/dangerous
            true/false brave/cowardly wise/foolish heavy/slight cheap/dear polite/rude sharp/blunt rough/smooth""",
        "noun": """day/night friend/enemy war/peace life/death joy/sorrow summer/winter top/bottom love/hatred
            beginning/end morning/evening question/answer truth/lie victory/defeat hope/despair heaven/hell
            north/south east/west front/back master/servant husband/wife""",
        "verb": """open/shut begin/finish love/hate come/go give/take buy/sell win/lose laugh/weep rise/fall push/pull
            remember/forget arrive/depart live/die find/lose sleep/wake praise/blame build/destroy ask/answer
            accept/refuse enter/leave""",
    }.items()
}

#: Near synonyms in the past perfect and passive, for sentences.
DONE = tuple(
    tuple(pair.split("="))
    for pair in """chased=pursued praised=commended pushed=shoved struck=hit frightened=scared dragged=pulled
    guarded=protected watched=observed robbed=plundered comforted=consoled welcomed=greeted begged=implored
    admired=esteemed mocked=ridiculed injured=hurt cheated=swindled seized=grabbed pardoned=forgiven
    blamed=accused beaten=defeated""".split()
)
CREATURES = tuple(
    """dog cat boy girl aunt uncle cousin monkey stranger sailor prince giant thief captain pupil shepherd widow gipsy
    merchant gardener""".split()
)
WHERE = (
    "in the garden|near the bridge|behind the church|at the fair|in the street|by the lake|on the hill|under the oak|"
    "in the forest|at the inn|beside the mill|in the kitchen"
).split("|")

PAST = dict(
    pair.split("/")
    for pair in """go/went see/saw take/took give/gave come/came make/made know/knew think/thought find/found
        tell/told feel/felt leave/left bring/brought begin/began keep/kept hold/held write/wrote stand/stood hear/heard
        meet/met run/ran pay/paid sit/sat speak/spoke lead/led grow/grew lose/lost fall/fell send/sent build/built
        understand/understood draw/drew break/broke spend/spent rise/rose drive/drove buy/bought wear/wore choose/chose
        sing/sang drink/drank swim/swam eat/ate fly/flew forget/forgot hide/hid ride/rode shake/shook sleep/slept
        steal/stole teach/taught throw/threw wake/woke win/won catch/caught fight/fought sell/sold bite/bit blow/blew
        walk/walked talk/talked laugh/laughed look/looked open/opened call/called turn/turned move/moved
        follow/followed help/helped cry/cried carry/carried marry/married try/tried stop/stopped drop/dropped beg/begged
        arrive/arrived dance/danced smile/smiled love/loved hope/hoped play/played stay/stayed wait/waited""".split()
)
PLURALS = dict(
    pair.split("/")
    for pair in """man/men woman/women child/children foot/feet tooth/teeth goose/geese mouse/mice wife/wives
        knife/knives life/lives leaf/leaves wolf/wolves thief/thieves loaf/loaves half/halves city/cities lady/ladies
        baby/babies story/stories country/countries party/parties family/families army/armies enemy/enemies
        church/churches box/boxes glass/glasses dress/dresses watch/watches bush/bushes dish/dishes match/matches
        dog/dogs cat/cats horse/horses tree/trees house/houses river/rivers road/roads hand/hands eye/eyes king/kings
        queen/queens letter/letters window/windows door/doors book/books boy/boys girl/girls day/days way/ways
        friend/friends garden/gardens flower/flowers soldier/soldiers ship/ships bird/birds star/stars stone/stones
        table/tables chair/chairs""".split()
)

#: From least to most. The name completes "which is more by ...".
SCALES = {
    "quantity": "no few some several most all",
    "how often": "never seldom sometimes often always",
    "heat": "freezing cold cool warm hot boiling",
    "size": "tiny small middling big huge",
    "time": "second minute hour day week month year century",
    "length": "inch foot yard mile",
    "age": "baby child youth adult",
    "number": "one two three four five six seven eight nine ten eleven twelve",
    "order": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "worth": "dreadful bad fair good splendid",
    "speed": "crawl walk run gallop",
    "rank": "servant squire knight duke prince king",
    "wealth": "beggar labourer farmer merchant banker",
    "sound": "whisper murmur shout roar",
    "water": "drop puddle pond lake sea ocean",
    "rise": "hillock hill mountain",
}
NUMBERS = tuple(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty""".split()
)
CYCLES = {
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "points of the compass": "north northeast east southeast south southwest west northwest",
    "seasons": "spring summer autumn winter",
    "odd months": "January March May July September November",
}

#: Cause, event, effect, told of one person; none of these events is in the embedded suite.
CHAINS = tuple(
    tuple(event.strip() for event in chain.split("|"))
    for chain in (
        "stayed out in the rain | caught a cold | took some medicine",
        "ate nothing all day | grew faint | begged for bread",
        "told a funny tale | made everyone smile | was asked for another",
        "sharpened the axe | cut down the tree | stacked the wood",
        "spilt the ink | spoiled the paper | wrote the page again",
        "quarrelled with a brother | left home in anger | sent a sorry letter",
        "saw a strange light | felt afraid | ran back to the house",
        "heard a knock | went to the door | let the stranger in",
        "rowed too far out | was caught by the storm | shouted for help",
        "worked hard in the field | gathered a fine harvest | filled the barn",
        "borrowed too much | could not pay | went to prison",
        "read late by candle | strained both eyes | bought spectacles",
        "left the meat on the table | found the dog eating it | cooked another supper",
        "climbed the old wall | fell into the ditch | tore a stocking",
        "caught a thief | was praised by all | received a medal",
        "missed a turning | got lost in the wood | slept under a tree",
        "fed the stray cat | won its trust | took it home",
        "trained every morning | ran the fastest race | got the silver cup",
        "drank bad water | became sick | lay in bed for a week",
        "played with matches | set the barn on fire | fetched water from the well",
        "forgot to feed the fire | let the room turn cold | put on a thick coat",
        "sang in the street | gathered a crowd | collected many pence",
        "found an old map | dug in the garden | uncovered a chest of gold",
        "overslept on Monday | came late to school | was punished by the master",
        "insulted the captain | was challenged to a duel | fled across the sea",
        "planted an apple seed | watered it for years | picked ripe fruit",
        "teased the bees | was stung on the hand | cried with pain",
        "broke a tooth | suffered great pain | visited the dentist",
        "dropped the lantern | lost the way in the dark | stumbled into a bog",
        "wrote a clever book | became famous | was invited to the palace",
    )
)
SPELLED = "ei ie ll l ss s rr r tt t ea ae ou uo ph f th ht".split()

#: Every label word of the suite, without a meaning: to be read off, and as a sign for any label of any question.
SUITE_WORDS = tuple(
    """negative positive unacceptable acceptable entailment neutral contradiction not_equivalent equivalent False True
    no yes choice1 choice2""".split()
)
