"""Keys of needles: an adjective and a noun, as "quiet-harbor"."""

import numpy as np

ADJECTIVE_LIST = """
able acid aged agile airy alert alive amber ample ancient
angry arctic arid ashen awake azure bald bare basic bitter black bland blank bleak blind blond
blue blunt bold brave brief bright brisk broad broken bronze brown burly busy calm candid
careful casual cheap chief chilly civil clean clear clever clumsy coarse cold common cool copper
coral cosmic crimson crisp crooked cruel curious curly damp dapper daring dark dear deep dense
dim distant dizzy double dry dull dusty eager early earnest east easy elder elegant empty equal
even exact extra fabled faint fair false famous fancy far fast fearless feeble fertile fierce
final fine firm fit flat fluent fond formal fragile frank free fresh frosty frozen full funny
fuzzy gaudy general gentle giant gifted glad gloomy golden good grand grave gray great green
grim gruff hairy half handy happy hard hardy harsh hasty heavy helpful hidden high hollow honest
hot huge humble hungry icy ideal idle inner ivory jade jaunty jolly keen kind known lame large
late lavish lazy lean level light likely little lively local lofty lone long loose lost loud
loyal lucid lucky lunar major mellow merry mighty mild minor misty modern modest moist mute
narrow native naval near neat nervous new nimble noble noisy normal north novel odd old olive
open orange ornate outer oval pale patient perfect petty plain playful plump polar polite poor
proud pure purple quaint quick quiet radiant rapid rare raw ready real red regal remote rich
rigid ripe robust rosy rough round royal ruby rude rugged rural rustic sad salty scarce scarlet
secret serene severe shallow sharp shiny short shy silent silly silver simple single sleepy
slender slim slow small smart smooth sober soft solar solemn solid sour south spare spicy square
stable stark steady steep stern stiff still stout strange strict strong sturdy subtle sudden
sunny super supple sure sweet swift tall tame tardy tender tense thick thin tidy timid tiny
tired tough tranquil true urban useful usual vacant vague vain valid vast velvet vivid vocal
warm weak weary west wet white whole wide wild windy wise witty wooden woolly young zealous
"""

NOUN_LIST = """
acorn actor almond anchor anvil apple apron arch armor arrow artist atlas attic aunt autumn
badge bagel baker ballad bamboo banjo banner barley barn barrel basin basket bath beach beacon
beak bean bear beard beast beaver bee beetle bell belt bench berry bicycle bird biscuit blanket
blossom board boat bone bonfire book boot border bottle boulder bowl box bracelet branch brass
bread breeze brick bridge broom brother brush bubble bucket buckle bugle bundle butter button
cabbage cabin cable cactus cage cake camel camera candle cannon canoe canyon cape captain
caravan card cargo carpet carrot cart castle cat cave cedar cellar chain chair chalk channel
chapel chart cheese cherry chest chimney chorus circle circus citadel city clay cliff cloak
clock cloud clover coach coast coat cobweb coffee coin collar comet compass concert cook corn
corner cottage cotton cousin cradle crane crater cricket crow crown crystal cup curtain cushion
daisy dancer dawn deer desert desk diamond diary dish dock doctor dog doll dolphin donkey door
dragon drawer dream drum duck dune eagle earth echo elbow elephant elm ember engine envelope
evening falcon farm farmer feather fence fern ferry festival fiddle field fig finger fire fish
flag flame flask flood floor flower flute fog forest fork fort fossil fountain fox frame friend
frog fruit furnace galaxy galley garden garlic gate gem ghost giraffe glacier glass globe glove
goat gong goose grain grape grass guest guitar gull hall hammer hammock harbor hare harp harvest
hat hawk hay hazel hedge helmet herald hero heron hill hinge honey hood hook horn horse hotel
house hunter island ivy jacket jar jewel journal journey judge jug juice jungle juniper kettle
key king kitchen kite kitten knight knot ladder lagoon lake lamb lamp lantern lark lawn leader
leaf lemon lens letter library lily lime lion lizard lobby lock log lotus lute lynx magnet maid
mango map maple marble market marsh mask mast meadow melon melody merchant meteor mill miner
mirror mist monkey moon morning moss moth mountain mouse museum music napkin nail nectar needle
nest night nomad notebook nugget nurse nutmeg oak oasis oboe ocean office onion opal opera
orchard orchid organ otter oven owl ox oyster page palace palm panda paper parade park parrot
path peach peacock pear pearl pebble pelican pen pencil pepper petal piano picture pie pigeon
pillar pillow pilot pine pioneer pirate planet plate plaza plow plum pocket poem poet pond pony
poppy port potato prairie prince prism prize puddle pumpkin puppet pyramid quarry queen quill
quilt rabbit radio raft rain raven ribbon rice ring river road robe robin rocket roof root rope
rose rudder saddle sail sailor salad salmon sand satin scarf school scout sea seal seed shadow
shark sheep shelf shell shield ship shirt shoe shore shovel signal silk singer sister sketch sky
sled smoke snail snow soap song spade sparrow spider spoon spring spruce square squirrel stable
star statue steam stone storm story stove stream street string summer sun swan sword table tale
tavern teacher temple tent theater thistle thread throne thunder tide tiger timber toast tomato
torch tower town toy trail train treasure tree trumpet tulip tunnel turtle twig umbrella uncle
valley vase vessel village vine violet violin voyage wagon walnut water wave wheat wheel whistle
widow willow window wing winter wizard wolf wool worker wren writer yacht yard zebra
"""

ADJECTIVES, NOUNS = ADJECTIVE_LIST.split(), NOUN_LIST.split()
WORDS = len(ADJECTIVES) * len(NOUNS)


def word(number: int) -> str:
    """One of WORDS, each number another."""
    adjective, noun = divmod(int(number), len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


def draw_words(rng: np.random.Generator, count: int) -> list[str]:
    """Words that differ from each other."""
    return [word(number) for number in rng.choice(WORDS, count, replace=False)]
