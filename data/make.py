"""Generate the dataset: stories about a small invented world, and short tasks with one correct answer each.

    python data/make.py            write the files to the folder of this script
    python data/make.py --check    exit with status 1 if the files differ from the output of this script

All random choices are seeded, so that every Python from 3.10 on writes the same bytes.

    train.txt         stories, one per line
    train.jsonl       tasks: a few questions of one kind with their answers, one JSON object per line
    chat.jsonl        the same questions as conversations, and requests for stories
    chat_test.jsonl   held-out questions, which are in no other file, with the answer to compare with
    notes.tsv         short notes between the characters, labeled by purpose
    prompts.jsonl     sums and differences in other words with only the result, for RL; prompts_test.jsonl is held out
    preferences.jsonl two beginnings of a story; the chosen one introduces the hero first; preferences_test.jsonl is held out
"""
import argparse
import hashlib
import json
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 7
STORIES = 2800
WORDS_PER_STORY = range(60, 161)

# ---------------------------------------------------------------------------------------------------- the world

PLACES = """
Mossbank   | water mill    | bluebells     Reedmarsh   | stilt house | bulrushes
Lanternby  | market hall   | marigolds     Copperhill  | bell tower  | pears
Oakhollow  | round library | acorns        Windgap     | windmill    | cowslips
Frostpeak  | star tower    | snowdrops     Fernwood    | tree house  | mushrooms
Pebblebay  | lighthouse    | seashells     Thistledown | honey house | raspberries
Plumley    | jam kitchen   | plums         Emberlake   | boat house  | lilies
"""
ROADS = """Frostpeak-Copperhill Copperhill-Windgap Windgap-Lanternby Lanternby-Mossbank Lanternby-Plumley
    Plumley-Thistledown Thistledown-Pebblebay Pebblebay-Emberlake Emberlake-Reedmarsh Reedmarsh-Mossbank
    Mossbank-Fernwood Fernwood-Oakhollow Oakhollow-Windgap Oakhollow-Frostpeak"""
# name, pronoun, kind of creature, home, job, favorite food, clothing, trait; lines 1 and 2, 3 and 4, ... are best friends
CAST = """
Mip    she duskmouse  Mossbank    | baker             | plum jam        | red scarf     | brave
Tolo   he  brookling  Reedmarsh   | boat builder      | pea soup        | blue cap      | patient
Wenna  she lampfox    Lanternby   | lamplighter       | honey cake      | yellow coat   | cheerful
Dobb   he  pebbleback Copperhill  | bell ringer       | toasted cheese  | green scarf   | careful
Luma   she owlkin     Oakhollow   | librarian         | blackberry pie  | purple hat    | clever
Fenn   he  fernhare   Windgap     | letter carrier    | carrot bread    | orange scarf  | restless
Orla   she owlkin     Frostpeak   | star watcher      | warm cocoa      | white shawl   | dreamy
Rusk   he  mossling   Fernwood    | wood carver       | mushroom stew   | brown hood    | quiet
Pella  she tuftling   Pebblebay   | lighthouse keeper | seaweed soup    | grey cloak    | steady
Nub    he  pebbleback Emberlake   | net mender        | gingerbread     | pink vest     | shy
Sorrel she fernhare   Thistledown | beekeeper         | nut butter      | golden hood  | kind
Bram   he  mossling   Plumley     | fruit grower      | apple crumble   | black hat     | generous
Tansy  she mossling   Fernwood    | herb seller       | rose jelly      | violet shawl  | tidy
Kip    he  duskmouse  Copperhill  | clockmaker        | corn bread      | silver vest   | curious
Una    she brookling  Emberlake   | ferry rower       | lemon tart      | orange cap    | proud
Jory   he  lampfox    Mossbank    | potter            | barley stew     | red apron     | funny
Hetty  she pebbleback Windgap     | miller            | oat porridge    | white apron   | stubborn
Alder  he  owlkin     Oakhollow   | map maker         | fig pudding     | green cloak   | wise
Ivy    she tuftling   Frostpeak   | weaver            | walnut fudge    | blue shawl    | gentle
Zeb    he  tuftling   Lanternby   | fiddler           | cherry trifle   | yellow hat    | merry
"""
WORK = {
    "baker": "baked bread before the sun came up", "boat builder": "built small boats that never leaked",
    "lamplighter": "lit every street lamp at dusk", "bell ringer": "rang the great bell at noon",
    "librarian": "dusted a thousand books", "letter carrier": "carried letters over the hills",
    "star watcher": "counted the stars until dawn", "wood carver": "carved spoons out of fallen branches",
    "lighthouse keeper": "climbed a hundred steps to light the great lamp", "net mender": "mended nets by the water",
    "beekeeper": "hummed songs to the bees", "fruit grower": "climbed tall ladders to look after the fruit trees",
    "herb seller": "tied herbs into neat bundles", "clockmaker": "wound up every clock in town",
    "ferry rower": "rowed travellers across the lake", "potter": "turned wet clay into bowls",
    "miller": "ground corn into soft white flour", "map maker": "drew maps with a tiny brush",
    "weaver": "wove blankets as soft as snow", "fiddler": "played the fiddle for anyone who would dance",
}
# kind of creature: its looks, a problem, and how only this creature can solve it
CREATURES = {
    "duskmouse": ("long silver whiskers", "the only key had dropped through a crack in the floor",
                  "was small enough to wriggle down through the crack and fetch the key"),
    "brookling": ("broad webbed feet", "the picnic basket had floated out to the middle of the water",
                  "dived in, swam out with quick webbed feet and pulled the basket back"),
    "lampfox": ("a softly glowing tail", "three little ones were lost in the dark cave behind the waterfall",
                "walked into the cave with a bright, glowing tail, and the little ones followed the light out"),
    "pebbleback": ("a shell like a smooth stone", "a cart full of apples had begun to roll down the hill",
                   "sat down in front of the wheel like a rock, and the cart stopped with a gentle bump"),
    "owlkin": ("wide round eyes", "a flock of cloud sheep had drifted off into the night",
               "looked far into the night with those round eyes and saw every sheep on the next hill"),
    "fernhare": ("ears as long as ferns", "somebody was calling from far away, but nobody could tell where",
                 "lifted both long ears, listened, and pointed straight to a boy stuck in a tall tree"),
    "mossling": ("soft green fur", "a nest of glimmerbird eggs had grown much too cold",
                 "curled up round the nest with warm green fur until every egg had hatched"),
    "tuftling": ("a tuft of bright feathers", "the best kite in the valley was caught on the highest roof",
                 "fluttered up in three short hops and freed the kite"),
}
SEASONS = {"spring": "breezy rainy bright mild", "summer": "hot sunny golden lazy",
           "autumn": "misty windy crisp grey", "winter": "snowy frosty icy chilly"}
THINGS = """copper key, wooden whistle, glass marble, silver compass, silver pen, clay flute, ruby button, music box,
    china cup, brass bell, painted spoon, tin star, pearl ring, amber bead, ivory comb, copper bracelet"""
RIDDLES = """
What has teeth but never bites? | a comb | The more you take away, the bigger it grows. | a hole
What has hands but cannot clap? | a clock | It runs all day and never leaves its bed. | a river
What gets wetter the more it dries? | a towel | It can fill a whole room and weighs nothing. | light
What has one eye and cannot see? | a needle | You can catch it in winter, but you cannot throw it. | a cold
What has a neck but no head? | a bottle | It follows you all day and is gone at night. | a shadow
What goes up when the rain comes down? | an umbrella | Break it by saying its name. | silence
"""
COLOURS = "red blue green yellow purple orange silver golden pink".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
OPPOSITES = """hot cold, big small, day night, up down, open shut, wet dry, fast slow, happy sad, old young, loud quiet,
    early late, full empty, hard soft, dark bright, high low, in out, left right, long short, near far, over under, push
    pull, rich poor, rough smooth, sharp blunt, strong weak, sweet sour, huge tiny, thick thin, true false,     warm
    cool, wide narrow, win lose, black white, clean dirty, deep shallow, first last, give take, float sink, asleep
    awake, begin end, brave afraid, careful careless, east west, north south, kind cruel, buy sell, remember forget,
    laugh cry, above below, before after, always never, inside outside, whole broken, friend stranger, summer winter,
    lost found, polite rude, simple difficult, arrive leave, question answer, more less, many few, same different"""

# the purpose of a note: its possible texts
NOTES = {
    "invitation": """Dear {friend}, [please come|will you come|do come] to {place} on {day}. [There will be {hero.food}.|We
    will sit by the {place.landmark}.|Bring {other} too.]|I am having a party on {day}, {friend}. [Will you be
    there?|The {place.landmark} is a fine spot for it.|Wear your {friend.clothing}!]|{friend}, we are all going to
    gather {place.grows} on {day}. Would you like to join us?|Supper is at my house on {day}, {friend}. [I am making
    {friend.food}.|{other} will be there too.]""",
    "thanks": """Dear {friend}, [thank you for the {thing}|many thanks for the {thing}]. [I carry it everywhere.|It is just
    what I wanted.|{other} likes it too.]|How kind of you, {friend}, to bring me {hero.food} on {day}. I ate it
    all.|{friend}, [you saved us|you were a great help] on {day}. [The {place.landmark} is as good as new.|We shall not
    forget it.]|I am so grateful for the {place.grows}, {friend}. They made {other} smile.""",
    "apology": """Dear {friend}, I am [so|very|truly] sorry about the {thing}. [It slipped.|I should have told you at
    once.|I will mend it by {day}.]|{friend}, please forgive me. [I forgot your birthday.|I ate your {friend.food}.|I was
    rude to you on {day}.]|It was my fault, {friend}, that the {place.grows} in {place} were trampled. I feel
    awful.|I did not mean to laugh at your {friend.clothing}, {friend}. It was wrong of me.""",
    "request": """Dear {friend}, [could you|would you] lend me your {thing} until {day}? [I will be careful.|{other} needs
    it too.]|{friend}, I need [a hand|some help] at the {place.landmark} in {place}. [Can you spare an hour?|Is {day} all
    right?]|Please bring me some {place.grows} from {place}, {friend}, if you pass that way on {day}.|Do you still have
    the recipe for {friend.food}, {friend}? [I would love to try it.|May I copy it?]""",
    "news": """Have you heard, {friend}? [{other} has found a {thing} in {place}.|{other} is moving to {place}.]|Dear
    {friend}, on {day} the {place.landmark} in {place} was struck by lightning. [Nobody was hurt.|{other} saw it all.]|The
    {place.grows} in {place} are out early this {season}, {friend}. {other} told me.|Big day here, {friend}: {other} the
    {other.job} has won the race to {place}.""",
}

# ------------------------------------------------------------------------------------------------- story grammar
# [one|two] is a choice, <name> a rule below, {slot} is filled from the scene. Season, day and weather are fixed for
# the whole story, so that plots can mention them anywhere.
RULES = {
    "intro": """In {hero.home} lived {hero}, a {hero.trait} {hero.creature} with {hero.look}. {hero.He} was the
    {hero.job} there[|, and {hero.he} loved {hero.food} more than anything].|{hero} was a {hero.trait} {hero.creature}
    who lived in {hero.home}. Every day {hero.he} {hero.work}.|Everyone in {hero.home} knew {hero} the {hero.job}.
    {hero.He} was a {hero.trait} {hero.creature} and always wore a {hero.clothing}.|There was once a {hero.creature}
    called {hero}. {hero.He} lived in {hero.home}, near the {hero.home.landmark}, and {hero.his} best friend was
    {friend}.|{hero} the {hero.creature} wore a {hero.clothing} and worked as a {hero.job} in {hero.home}.|If you ever
    go to {hero.home}, ask for {hero}, the {hero.trait} {hero.job} in the {hero.clothing}.""",
    "when": """One {season} [morning|afternoon|day],|One {weather} [morning|day],|On {day},|On a {weather} {day},|Early
    on {day},|One {day} in {season},""",
    "lead": """<intro> <when> {hero.he}|<intro> <when> {hero}|<when> {hero} the {hero.job}|<when> {hero} the
    {hero.creature}|It was a {weather} {day} in {hero.home}, and {hero} the {hero.job}|<when> {hero}, the {hero.trait}
    {hero.job} of {hero.home},""",
    "pal": """{hero.his} best friend {friend}|{friend} the {friend.job}|{hero.his} best friend, {friend} the
    {friend.creature},|{friend}, who lived in {friend.home},""",
    "close": """That evening {hero} and {friend} shared some {hero.food}, which was {hero}'s favourite.|"What a day!"
    said {friend}, and {hero} had to agree.|The two friends laughed about it for [weeks|a long time].|When the moon rose
    over {hero.home}, {hero} was still smiling.|"You are the best friend I could wish for," said {hero}, and {friend}
    turned quite pink.|To celebrate, {friend} brought out some {friend.food}, and there was enough for everyone.|{hero}
    slept very well that night.|{hero} wrote it all down that night so as not to forget a single thing.|[And if|If] you
    visit {hero.home} today, they will tell you the same story.|Evening came, and the [warm kitchen|whole street]
    smelled of {hero.food}.""",
}
PLOTS = {
    "lost": """<lead> could not find {hero.his} {thing}. {hero.He} [looked under the bed, behind the stove and inside
    both boots|turned out every drawer and shook every cushion|asked everyone in the street], but there was no sign of
    the {item}. ["I had it on {yesterday}," {hero} sighed.|"A {item} does not walk away by itself," said {hero}.] [So
    {hero.he} went to ask <pal> for help.|Luckily {friend} was not busy and came to help at once.] ["When did you see it
    last?" asked {friend}. "By the {place.landmark} in {place}," said {hero}. They hurried there and searched among the
    {place.grows} until [something twinkled in the grass|{friend} gave a shout]. The {item} had slipped through a hole
    in {hero}'s pocket! {friend} sewed up the hole with {colour} thread, so that it could not happen again.|They
    followed some tiny footprints to a nest near the {place.landmark} in {place}. A glimmerbird was sitting on a heap of
    pretty things. "Please may I have my {item} back?" asked {hero}. The bird only blinked. Then {hero} held out a shiny
    {colour} ribbon. [It was a fair swap|The bird liked that even more], and the {item} came rolling out of the
    nest.|{friend} looked {hero} up and down and began to giggle. "What is that on your {hero.clothing}?" {friend.he}
    asked. The {item} had been pinned there the whole time. {hero} laughed until {hero.his} sides ached.|In a dusty
    corner they heard a tiny snore. A snorebeetle had pulled the {item} close and was hugging it in its sleep. "We must
    not wake it," whispered {friend}. So they sat down and waited [quietly|without a word] until the beetle yawned,
    blushed and handed the {item} back.] <close>""",
    "gift": """<lead> looked at the calendar. The birthday of {friend} was on {day3}, and it was already {day}. "What
    would a {friend.trait} {friend.creature} like best?" {hero} wondered. [{friend} loved {friend.food}, so on {day2}
    {hero} stirred and tasted all day long. By evening there was enough for a giant. On {day3} {hero} pulled it all to
    {friend.home} in a little {colour} cart. "Some {friend.food}! My favourite!" cried {friend}. ["But who is going to
    eat all this?" In the end|They tried their best, but in the end] the whole of {friend.home} came to help with the
    eating.|[In an old chest {hero.he} found a {thing}, all dull and dusty. {hero} spent {day2} polishing it until it
    shone. On {day3} {hero} walked to {friend.home} and said, "Close your eyes and hold out your hands." {friend} felt
    the {item} and gasped. From then on {friend.he} carried that {item} everywhere[, even to bed|], and it always made
    {friend.him} think of {hero}.|There was no money in the jar, so on {day2} {hero.he} made up a song. It told how
    {friend} {friend.work}, and it even had a verse about the {friend.clothing}. On {day3} {hero} sang it in front of
    the {friend.home.landmark} in {friend.home}. The highest note came out as a squeak. "Nobody ever gave me a song
    before," said {friend} softly. "Please sing it again, squeak and all."|On {day2} {hero.he} began to knit a {colour}
    blanket, but the wool ran out and the blanket was far too small. {hero} felt foolish, yet on {day3} {hero.he} gave
    it to {friend} all the same. {friend} folded it once, put it on {friend.his} head and danced about. "I needed a new
    nightcap!" {friend.he} cried. It was the perfect present after all.] <close>]""",
    "race": """Once a year there was a race from {start} to {goal}. <when> {hero} the {hero.job} and {other} the
    {other.creature} stood side by side at the {start.landmark}, and {friend} waved a {colour} flag. "Ready, steady,
    go!" [Off they ran|Away they flew] in a cloud of dust. [{other} was soon far ahead. "There is plenty of time,"
    thought {other}, and stopped to pick some {goal.grows}. [One handful became two|Picking led to eating], and eating
    led to a nap. {hero} kept going, not fast, but never stopping. When {other} woke up, the crowd at the
    {goal.landmark} was already cheering for {hero}.|{hero} was winning easily. Then a small voice squeaked, "Help!" A
    baby snorebeetle lay on its back in the road, kicking all its legs. {hero} stopped and turned it over. {other} ran
    past and won. But when {other} heard why {hero} had been late, {other.he} came over at once. "[The prize is a
    {thing}, and it belongs to you|You should have this {thing}, not me]," said {other}, and {hero} kept the {item}
    always.|Halfway there a thick fog rolled in. Nobody could see the road. "Let us hold hands," called {hero}. Step by
    step they felt their way, one counting the stones and the other listening for the crowd. They came in together, so
    the judges gave them one prize, a big bowl of {other.food}, and two spoons.] <close>""",
    "storm": """<intro> All through {yesterday} the clouds had been growing, and on {day} a storm broke over
    {hero.home}. [The wind howled round the {hero.home.landmark}|Rain drummed on every roof|Shutters banged and hats
    flew away]. "[Everyone inside|Hold on to your hats|Here it comes|Shut the windows]!" shouted {hero}. [A loose rope
    was flapping from the top of the {hero.home.landmark}, and the whole roof was shaking. {hero} climbed up, with <pal>
    holding the ladder. {hero.He} tied one knot, then another, then a third for luck. The roof groaned, but it [stayed
    where it was|did not move].|The stream had burst its banks, and water was creeping up to the doors. {hero} and
    {friend} asked everyone to stand in a long row. They passed sacks of sand from hand to hand until there was a wall
    as high as {hero}'s chin. The water sniffed at the wall and went away.|In the middle of it all {hero} noticed that
    {other} was missing. {hero} and {friend} lit a lantern and went out, calling into the rain. They found {other} under
    an upturned cart, wet through, with four lambs hidden in a blanket. "I could not leave them behind," said {other}.
    Together they carried the lambs to a warm kitchen.] [On {day2} the sky was clean and blue|By {day2} the storm had
    gone], and [the {hero.home.grows} were still standing|{other} cooked some {other.food} for {hero} and {friend}|all
    the neighbours thanked {hero}].""",
    "repair": """<when> the clock of the {hero.home.landmark} in {hero.home} stopped. Nobody knew what was wrong. [Some
    people kicked it, and some gave it advice, but that did not help.|] "Let me take a look," said {hero}, the
    {hero.trait} {hero.job}. {hero.He} [took off {hero.his} {hero.clothing}|fetched a lamp and an oil can] and opened
    the little door behind the clock. [There, between two wheels, was a family of glimmerbirds with {n} eggs. "We cannot
    move them now," said {hero}. So {hero} and {friend} hung up a sign that said PLEASE WAIT. {other} grumbled until {n}
    wet beaks peeped out. A week later the birds flew off, and the wheels turned again.|One small wheel was missing a
    tooth. {hero} carved a new one out of wood, but it was too big. The second one was too small. "Try a third time,"
    said <pal>. {hero} did, and it fitted so well that everything began to hum.|The cogs were stuck fast with something
    brown and sticky. {hero} tasted it. "This is {other.food}!" {hero.he} called. In the crowd {other} turned red. "I
    only sat there to eat my lunch," {other.he} said. "I was too ashamed to tell." {hero} fetched a bucket, and they
    scrubbed it clean together.] [So the clock was mended, and|So all was well again, and] {hero} was thanked by
    everyone in {hero.home}. [<close>|]""",
    "riddle": """<lead> [came to a stone gate|set out for {place} and came to an old gate] where a bearded goat was
    sitting in the middle of the road. "[Nobody|No one] may pass," said the goat, "without solving my riddle. {riddle}"
    {hero} scratched {hero.his} chin. ["Is it {wrong}?" {hero.he} asked. "Wrong," said the goat, and chewed a thistle.
    {hero} sat down on a stone to think. At last {hero.he} jumped up and cried, "It is {solution}!" The goat was so
    surprised that it stopped chewing.|{hero.He} could not think of anything, so {hero.he} ran back for <pal> and
    brought {friend.him} to the gate. {friend} whispered, "Could it be {wrong}?" "No, no," {hero} whispered back, "but
    now I know. It is {solution}!" The goat nodded [slowly|gravely]. "Two heads are better than one," it said.|Then
    {hero.he} smiled, for {friend} had told {hero.him} that very riddle on {yesterday}. "It is {solution}," said {hero}.
    Then {hero.he} added, "To be honest, I knew it already." "An honest traveller!" said the goat. "That is worth more
    than a good guess."] [It gave {hero} a {thing} to keep|The gate swung open]. [At home {hero} tried the riddle on
    {other}, who guessed {wrong} and was cross for an hour.|"Come again," the goat called. "Hardly anybody talks to me."
    So {hero} came back every {day}, and always brought some {hero.food} to share.]""",
    "market": """<lead> packed {total} {hero.home.grows} in a basket and set out for [market|the market hall in
    Lanternby]. [{other} bought {n} of them [for a party|at once], so {hero} had {m} left. ["Now there are only {m},"
    said {hero}.|{hero.He} counted them twice to be sure.] Then {friend} came by and looked so longingly at the basket
    that {hero} simply gave {friend.him} the last {m}. "But you have not earned a coin for those!" said {friend}. "No,"
    said {hero}, "I have earned a smile." On {day2} {friend} came back with {m} helpings of {friend.food}, one for each
    gift.|In the morning {hero} sold {n} to {other}, and in the afternoon {hero} sold {m} to an old shepherd. That made
    {total} in all, and the basket was empty. {hero} got one coin for each, so there were {total} coins in {hero.his}
    purse. [With them {hero.he} bought a {thing}, something {hero.he} had wanted since {season} began.|On the way home
    {hero.he} heard that {friend}'s window had been broken by the wind. {hero} gave all {total} coins for new
    glass.]|But on the bridge {hero} stumbled, and {n} of them rolled into the river. Only {m} were left. "Who will want
    such a small basket?" {hero} thought. At the market {other} stopped and said, "I need exactly {m}, not one more and
    not one less!" {other} gave {hero} a {thing} for them, and {hero} walked home with the {item} in {hero.his} pocket,
    humming.] [It had been a good {day}.|When the moon rose over {hero.home}, {hero} was still smiling.|{hero} slept
    very well that night.|]""",
    "harvest": """<lead> went out with {friend} to gather {place.grows} for the {season} feast in {place}. That day they
    found {n}. On {day2} they found {m} more, so now they had {total}. [But on {day3} the basket was empty! A trail of
    crumbs led behind the {place.landmark}, where {other} sat with a very round belly. "I thought they were for
    everybody," said {other}, who was truly sorry. So {other} helped them to pick {total} new ones, and was first to
    wash the dishes after the feast.|"I found most of them," said {hero}. "No, I did," said {friend}. They argued until
    [their ears were hot|they were hoarse]. Then {other} came along and asked, "Which of you will eat them all alone?"
    Neither of them wanted that. They looked at each other and began to laugh. On {day3} they put all {total} into one
    big bowl.|"One more, and it will be {more}," said {hero} on {day3}, and reached up for the finest of all. Just then
    a family of hungry cloud sheep came drifting by. {hero} looked at the sheep and then at the basket. There were
    {total} in it, and that was plenty. So the sheep got the finest one, and they hummed with joy.] At the feast {hero}
    and {friend} sat next to each other, and [Zeb's fiddle was heard|the lanterns burned] until midnight.""",
    "journey": """<lead> had to take a {thing} [all the way to|to] {goal}. "The road goes from {start} to {middle}, and
    from {middle} to {goal}," said {friend}, and drew it in the sand. [At {middle} {hero} rested under the
    {middle.landmark}|In {middle} {hero} stopped to smell the {middle.grows}] and ate some {hero.food}. [But from there
    two paths went on, and there was no sign. "Moss grows on the north side," {hero} remembered, and felt the trees one
    by one until the right path was found.|Then it began to grow dark, and the path seemed full of eyes. "Who is there?"
    called {hero}. It was only {n} tickle moths, who were afraid of the dark as well. They walked on together and told
    each other jokes.|There the bridge had been washed away. {other} was sitting on the bank with a raft of old barrels.
    "I can take you over," said {other}, "if you tell me a story that I do not know." {hero} told {other.him} this one,
    as far as it had got.] [Before long|At sunset|At last] {hero} saw the {goal.landmark} of {goal}. [The people there
    gave a cheer and hung up the {item} for all to see.|An old {goal} shopkeeper took the {item} and wept a happy tear.
    "I lost this when I was little," she said.] [On the way back the road felt only half as long.|When {hero} came home,
    {friend} was waiting with some {friend.food}.]""",
    "seed": """<lead> got a seed from {other}. "Plant it and wait," said {other}, "and you will have a wonder." {hero}
    put it in a {colour} pot. [On {day2} nothing could be seen. On {day3} {hero} dug the seed up to look at it, and put
    it back, and dug it up again. "Stop that!" said <pal>. "How would you like to be woken every hour?" {hero} promised
    to let it sleep, and a week later a green tip came up.|{hero.He} watered it at breakfast, at noon and at night,
    until the poor pot was a pond. "Even a brookling would get lost in there," said {friend}. They tipped the water out
    and put the pot in the sun. {hero} learned to wait, and by the end of the month there was a stem as tall as a
    spoon.|{hero.He} watched it all through {day2}, and forgot to work, and forgot to eat. "Come for a walk," said
    {friend}. "Seeds are shy." So they went to see the {place.landmark} in {place}. When they came home, a tiny leaf was
    waving at them.] [The flower that opened at last was {colour}, just like the pot, and it sang one soft note each
    evening.|At last it bore one huge fruit, and inside the fruit was a {thing}! Nobody could explain it, and {hero} did
    not try.|It grew into a bush, and the bush was full of seeds. {hero} gave one to every neighbour in {hero.home}, and
    kept only one.] "Wonders are never in a hurry," said {other}.""",
    "talent": """<intro> [Sometimes|Now and then] {hero} wished to be more like other people. "What use is it to have
    {hero.look}?" {hero.he} asked. "You will see," said <pal>. <when> there was a great fuss at the {place.landmark} in
    {place}, for {hero.trouble}. {other} [ran up and down|called for help|thought and thought], but nothing worked. "May
    I try?" asked {hero}. {hero.He} {hero.deed}. [Everyone clapped and threw their hats into the air.|"I have never seen
    such a clever {hero.creature}!" cried {other}.|{other} gave {hero} a {thing} to say thank you.] [From that day on,
    {hero} never wanted to be anyone else.|"I told you so," said {friend}. "Be glad that you are a
    {hero.creature}."]""",
    "stray": """<lead> found a baby [cloud sheep|glimmerbird|tickle moth] on the doorstep. It was no bigger than a bun,
    and it [shivered|sneezed|squeaked] sadly. {hero} wrapped it in {hero.his} {hero.clothing}. "Where do you belong?"
    {hero.he} asked. [It would not touch bread or milk, or even {hero.food}. But when {friend} came by with a bunch of
    {place.grows}, it gobbled up every one. "Those come from {place}," said {friend}. "So that must be its home!"
    They|<pal> found a tiny bell on its foot, with the name {place} on it. So they|{hero} asked {other}, who knew about
    wild things. "They live near the {place.landmark} in {place}," said {other}. So {hero} and {friend}] set out for
    {place} on {day2}. The little one [rode in a basket|slept in {hero}'s pocket]. [A whole family was waiting there,
    and made such happy noises that the windows rattled.|At first they saw nobody. Then {hero} whistled, and the air was
    full of soft, happy voices.] [Every {season} since then, a small visitor has come to {hero.home} and left a {colour}
    flower by the door.|{hero} was a little sad to say goodbye, but {friend} took {hero.him} by the hand.|The mother
    dropped a {thing} at {hero}'s feet to say thank you. {hero} keeps that {item} to this day.]""",
    "surprise": """<intro> {day} was {hero}'s birthday, but nobody said a word about it. {friend} [only nodded and
    hurried past|said that {friend.he} had no time to talk]. "They have all forgotten," thought {hero}, and kicked a
    small stone down the road. {hero.He} walked as far as the {place.landmark} in {place} and sat there until the sun
    was low. [Then a trail of {colour} paper stars caught {hero.his} eye.|A glimmerbird hopped up and dropped a note.
    COME HOME, it said.] {hero} hurried back to {hero.home}. The house was dark, and the door stood open. "Happy
    birthday!" [roared|sang|cried] everyone at once, and a hundred candles were lit. [There was {hero.food}, of course,
    as much as {hero.he} could eat.|{friend} gave {hero.him} a {thing}.|{other} had a wheelbarrow full of {place.grows}
    for {hero.him}.|{other} gave {hero.him} a pair of {colour} socks that did not quite match.] ["How could we forget
    you?" said {friend}.|"I am very bad at keeping secrets," said {friend}.] {hero} [laughed and cried at the same
    time|could not say a word for joy].""",
    "noise": """Every night that {season} a strange noise was heard in {hero.home}. [It went boom, boom, boom.|It was a
    long, low moan.|It sounded like a giant humming in the bath.] [Some said it was a ghost, and some said it was a
    dragon.|People pulled their blankets over their ears.] "I shall find out what it is," said {hero}, who was a
    {hero.trait} {hero.job}. <when> {hero} and <pal> hid behind the {hero.home.landmark} with a lantern and some
    {friend.food}. [At midnight the noise began. {friend} jumped, and so did {hero}.|They waited and waited. Then it
    came, louder than ever.] They crept nearer. [It was only {other}, who was learning to play the tuba! "I practise at
    night," said {other}, "because I am so bad at it." "Then practise with me," said {hero}. By the end of {season},
    people opened their windows to listen.|It was a huge old snorebeetle, fast asleep in a barrel. Its snores made the
    whole barrel shake. They filled the barrel with straw, and the next snore was as soft as a sigh.|It was the wind,
    blowing across an empty bottle on a wall. {hero} picked the bottle up. Then {hero.he} fetched {n} more and set them
    in a row, and from that night on the wind played tunes.] ["So much for dragons," said {friend}.|"I was not
    frightened at all," said {friend}, who was still holding {hero}'s arm.|<close>]""",
    "borrow": """<lead> borrowed a {thing} from {other}. "Take good care of it," said {other}[. "It was a present from
    my grandmother."|, who did not lend things often.] {hero} promised. But [while {hero.he} was running home|on the
    steps of the {place.landmark}|on a wet stone] {hero.he} slipped, and the {item} broke. {hero} felt [hot and
    cold|quite ill]. ["I could hide it," {hero.he} thought. But that night {hero} could not sleep, and on {day2}
    {hero.he} went to see {other}.|{hero.He} told {friend} about it. "You know what you have to do," said {friend}. On
    {day2} they went to see {other} together.] "I broke your {item}," said {hero} in a small voice. "I am very sorry."
    [{other} was silent for a long time. "It was brave of you to tell me," {other.he} said at last. "A {item} is easy to
    mend. A lie is not."|To {hero}'s surprise, {other} smiled. "I broke it once myself," said {other}. "Look, here is
    the old crack."] [They mended it together at the kitchen table|{friend} knew the right kind of glue, and they mended
    it before supper], and {other} [shared out|brought out] some {other.food}. [{hero} never ran with borrowed things
    again.|Since then {other} has lent {hero} all sorts of things.|"Now it has two stories to tell," said {other}.]""",
    "soup": """<when> there was a cooking contest at the {place.landmark} in {place}. {hero} the {hero.job} was sure to
    win with {hero.his} famous {hero.food}. The judge was {other}[, who had the finest nose in the valley|]. {hero}
    stirred and hummed, and {friend} chopped and peeled. [[But {hero} mixed up two jars and put in salt where there
    should have been sugar. "Quick," said {friend}, "add some {place.grows}!" {hero} threw in {n}, then {m} more,
    {total} in all, and shut {hero.his} eyes. {other} took a spoonful and frowned. {other.He} took another. "I have
    never tasted anything like it," {other.he} said. "It wins!"|Next to them stood a little boy whose fire would not
    burn. He was close to tears. {hero} looked at {friend}, and {friend} nodded. They gave the boy half of their wood.
    His soup was ready just in time, and it won first prize. "I could not have done it without you," said the boy, and
    he gave {hero} his {thing}.] <close>|Then the smell brought visitors. First came a hungry child, then a tired
    shepherd, then an old lady with an empty bowl. {hero} could not send them away. When {other} came, there was not a
    crumb left in the pot. "You cannot win without any food," said {other}, "but I see three happy faces here." So
    {hero} got no prize, and had the best day of the year.]""",
}

# ------------------------------------------------------------------------------------------------------ facts

CHARACTER_FACTS = (  # level, answer, sentence, questions with this answer
    (1, "{who.home}", "{who} lives in {who.home}.",
     "Where does {who} live?|Which place is the home of {who}?|In which place does {who} live?"),
    (1, "{who.job}", "{who} works as a {who.job}.",
     "What is the job of {who}?|What does {who} work as?|Which job does {who} do?"),
    (1, "{friend}", "The best friend of {who} is {friend}.",
     "Who is the best friend of {who}?|What is the name of the best friend of {who}?|Whose best friend is {who}?"),
    (2, "{who.creature}", "{who} is a {who.creature}.",
     "What kind of creature is {who}?|Which kind of creature is {who}?|To which kind of creature does {who} belong?"),
    (2, "{who.food}", "The favourite food of {who} is {who.food}.",
     "What is the favourite food of {who}?|What does {who} like to eat best?|Which food does {who} love most?"),
    (2, "{who.colour}", "The {who.garment} of {who} is {who.colour}.",
     "What colour is the {who.garment} of {who}?|Which colour is the {who.garment} of {who}?"),
    (3, "{who}", "The {who.job} is {who}.", "Who is the {who.job}?|Who works as a {who.job}?"),
    (3, "{friend.home}", "The best friend of {who} lives in {friend.home}.",
     "Where does the best friend of {who} live?|Which place is the home of the best friend of {who}?"),
    (3, "{friend.job}", "The best friend of {who} works as a {friend.job}.",
     "What is the job of the best friend of {who}?|What does the best friend of {who} work as?"),
)
PLACE_FACTS = (
    (2, "{place}", "The {place.landmark} is in {place}.",
     "Where is the {place.landmark}?|In which place is the {place.landmark}?"),
    (2, "{place.grows}", "In {place} you can pick {place.grows}.",
     "What can you pick in {place}?|What is there to pick in {place}?"),
    (3, "{place}", "You can pick {place.grows} in {place}.",
     "Where can you pick {place.grows}?|In which place can you pick {place.grows}?"),
)
PAIRS_PER_LEVEL = {1: 750, 2: 400, 3: 200}  # question and answer pairs of each kind in train.jsonl


# ----------------------------------------------------------------------------------------------------- draws

class Draw:
    """Seeded choices that use random() only, the method whose numbers are the same in all versions of Python."""

    def __init__(self, *seed):
        digest = hashlib.blake2b(repr((SEED, *seed)).encode(), digest_size=8).digest()
        self.random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, limit):
        return int(self.random() * limit)

    def between(self, low, high):
        return low + self.below(high - low + 1)

    def pick(self, items):
        return items[self.below(len(items))]

    def sample(self, items, count):
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(min(count, len(pool)))]


# --------------------------------------------------------------------------------------------- people and places

@dataclass(frozen=True)
class Place:
    name: str
    landmark: str
    grows: str

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Character:
    name: str
    he: str
    creature: str
    home: Place
    job: str
    food: str
    clothing: str
    trait: str

    def __str__(self):
        return self.name

    him = property(lambda self: "him" if self.he == "he" else "her")
    his = property(lambda self: "his" if self.he == "he" else "her")
    He = property(lambda self: self.he.capitalize())
    work = property(lambda self: WORK[self.job])
    look = property(lambda self: CREATURES[self.creature][0])
    trouble = property(lambda self: CREATURES[self.creature][1])
    deed = property(lambda self: CREATURES[self.creature][2])
    colour = property(lambda self: self.clothing.split()[0])
    garment = property(lambda self: self.clothing.split()[1])


def read_cast():
    for line in CAST.strip().splitlines():
        first, *rest = [part.strip() for part in line.split("|")]
        name, he, creature, home = first.split()
        yield Character(name, he, creature, PLACE[home], *rest)


PLACE = {found[0]: Place(*found) for found in re.findall(r"(\w+) +\| (\w[\w ]*\w) +\| (\w+)", PLACES)}
PEOPLE = list(read_cast())
FRIEND = {person: PEOPLE[index ^ 1] for index, person in enumerate(PEOPLE)}  # 0 with 1, 2 with 3, and so on
ROAD_ENDS = [[PLACE[name] for name in road.split("-")] for road in ROADS.split()]
NEIGHBOURS = {place: [a if b is place else b for a, b in ROAD_ENDS if place in (a, b)] for place in PLACE.values()}


# ------------------------------------------------------------------------------------------------------- stories

def expand(text, draw):
    """Expand all rules, then all choices from the inside out."""
    while "<" in text:
        text = re.sub(r"<(\w+)>", lambda match: f"[{RULES[match[1]]}]", text)
    while "[" in text:
        text = re.sub(r"\[([^][]*)\]", lambda match: draw.pick(match[1].split("|")), text)
    return text


def polish(text):
    """Normalize spaces, write `an` before vowels, and capitalize sentences."""
    text = re.sub(r",\s*(?=[.,])", "", " ".join(text.split()))
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
    return re.sub(r"(^|[.!?] |\.\" )([a-z])", lambda match: match[1] + match[2].upper(), text)


def scene(hero, season, draw):
    """The slots of a story, which are the same in all of its sentences."""
    friend = FRIEND[hero]
    start = hero.home
    middle = draw.pick(NEIGHBOURS[start])
    goal = draw.pick([place for place in NEIGHBOURS[middle] if place is not start])
    today, number, extra = draw.below(7), draw.between(2, 9), draw.between(2, 9)
    thing = draw.pick(THINGS.split(",")).strip()
    riddles = [part.strip() for part in re.split(r"[|\n]", RIDDLES.strip())]
    puzzle, wrong = draw.sample(range(0, len(riddles), 2), 2)
    return {
        "hero": hero, "friend": friend, "start": start, "middle": middle, "goal": goal, "season": season,
        "other": draw.pick([person for person in PEOPLE if person not in (hero, friend)]),
        "place": draw.pick([place for place in PLACE.values() if place is not start]),
        "weather": draw.pick(SEASONS[season].split()), "thing": thing, "item": thing.split()[1],
        "colour": draw.pick(COLOURS), "n": NUMBERS[number], "m": NUMBERS[extra], "total": NUMBERS[number + extra],
        "more": NUMBERS[number + extra + 1], "yesterday": DAYS[today - 1], "day": DAYS[today],
        "day2": DAYS[(today + 1) % 7], "day3": DAYS[(today + 2) % 7],
        "riddle": riddles[puzzle], "solution": riddles[puzzle + 1], "wrong": riddles[wrong + 1],
    }


def story(number, attempt):
    """A story. Plots and heroes alternate with its number; the rest is random."""
    draw = Draw("story", number, attempt)
    plot = expand(list(PLOTS.values())[number % len(PLOTS)], draw)
    seasons = [season for season in SEASONS if not (season == "winter" and "grows}" in plot)]
    hero = PEOPLE[number // len(PLOTS) % len(PEOPLE)]
    return polish(plot.format(**scene(hero, draw.pick(seasons), draw)))


def stories():
    """Distinct stories, each short enough for the context of a small model."""
    seen = {}
    for number in range(STORIES):
        attempts = (story(number, attempt) for attempt in range(1000))
        seen[next(text for text in attempts if text not in seen and len(text.split()) in WORDS_PER_STORY)] = number
    return list(seen)


# ----------------------------------------------------------------------------------------------------- questions

@dataclass(frozen=True)
class Question:
    kind: str
    level: int
    question: str
    answer: str    # the short exact answer, such as 42
    sentence: str  # the same answer as a whole sentence


def is_held_out(question):
    """Whether a question is in the test split: about one in ten, by its hash, the same in all files."""
    digest = hashlib.blake2b(question.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") % 10 == 0


def story_words(shortest, longest):
    """Words from the stories, so that spelling tasks use words of the training text."""
    text = re.sub(r"\{[^}]*\}|<\w+>", " ", " ".join([*PLOTS.values(), *RULES.values(), *WORK.values(), OPPOSITES]))
    words = sorted(set(re.findall(r"(?<![\w'])[a-z]+(?![\w'])", text)))
    return [word for word in words if shortest <= len(word) <= longest]


def worked(a, sign, b):
    """48 plus 37 -> 8 plus 7 is 15, 40 plus 30 is 70, so 48 plus 37 is 85. Small models learn these steps, but not all at once.

    Up to 9 plus 9, and 18 minus 9, there is only one step."""
    answer, word = (a + b, "plus") if sign > 0 else (a - b, "minus")
    steps, borrowed = [], 10 * (sign < 0 and a % 10 < b % 10)
    if a > 9 and answer > 9 or b > 9:
        steps.append((a % 10 + borrowed, b % 10))
    if b > 9:
        steps.append((a - a % 10 - borrowed, b - b % 10))
    told = [f"{x} {word} {y} is {x + sign * y}" for x, y in [*steps, (a, b)]]
    return ", so ".join([", ".join(told[:-1]), told[-1]] if steps else told) + "."


def sums():
    for level, left, right in ((1, range(10), range(10)), (2, range(10, 100), range(1, 10)),
                               (3, range(10, 100), range(10, 100))):
        pairs = [(a, b) for a in left for b in right]
        for a, b in Draw("sums", level).sample(pairs, 300 * level):
            yield level, f"What is {a} plus {b}?", a + b, worked(a, 1, b)


def differences():
    spans = {1: [(a, b) for b in range(10) for a in range(b, b + 10)],
             2: [(a, b) for a in range(10, 100) for b in range(1, 10)],
             3: [(a, b) for a in range(10, 100) for b in range(10, a + 1)]}
    for level, pairs in spans.items():
        for a, b in Draw("differences", level).sample(pairs, 300 * level):
            yield level, f"What is {a} minus {b}?", a - b, worked(a, -1, b)


def reversals():
    for level in (1, 2, 3):
        for word in story_words(level + 2, level + 2):
            spelled, back = "-".join(word), "-".join(reversed(word))
            yield level, f"What is {spelled} backwards?", back, f"{spelled} backwards is {back}."


def counting():
    draw, words = Draw("counting"), story_words(4, 5)
    for word in story_words(2, 7):
        yield 1, f"How many letters are in {'-'.join(word)}?", len(word), f"There are {len(word)} letters in it."
    for _ in range(300):
        some = draw.sample(words, draw.between(2, 7))
        yield 2, f"How many words are in {', '.join(some)}?", len(some), f"There are {len(some)} words."
    for _ in range(300):
        word, *others = draw.sample(words, 3)
        row = draw.sample([word] * draw.between(2, 5) + [draw.pick(others) for _ in range(draw.between(1, 3))], 9)
        times = row.count(word)
        yield 3, f"How many times is {word} in {', '.join(row)}?", times, f"It is there {times} times."


def calendar():
    for word, names in (("day", DAYS), ("month", MONTHS)):
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            for start in (f"What {word} comes", f"Which {word} comes", f"What {word} is", f"Which {word} is"):
                yield 1, f"{start} right after {name}?", after, f"{after} comes after {name}."
                yield 1, f"{start} right before {name}?", before, f"{before} comes before {name}."
            for count in range(2, 7):
                for direction, step in (("after", 1), ("before", -1)):
                    walk = [names[(index + step * far) % len(names)] for far in range(1, count + 1)]
                    counted = ", ".join(f"{far} is {there}" for far, there in enumerate(walk, 1))
                    yield 2 if count < 5 else 3, f"What {word} is {count} {word}s {direction} {name}?", walk[-1], f"{counted}."


def opposites():
    pairs = [pair.split() for pair in OPPOSITES.split(",")]
    for index, pair in enumerate(pairs):
        for word, other in (pair, pair[::-1]):
            for ask in ("What is", "Which word is", "Can you name"):
                question, sentence = f"{ask} the opposite of {word}?", f"The opposite of {word} is {other}."
                yield 1 + 3 * index // len(pairs), question, other, sentence


def comparing():
    for level, limit in ((1, 10), (2, 100), (3, 1000)):
        draw = Draw("comparing", level)
        for _ in range(500):
            a, b = draw.sample(range(limit), 2)
            word, best = draw.pick((("larger", max(a, b)), ("smaller", min(a, b))))
            yield level, f"Which is {word}, {a} or {b}?", best, f"{best} is {word} than {a + b - best}."


def sorting():
    for level, limit, count in ((1, 10, 3), (2, 100, 3), (3, 100, 4)):
        draw = Draw("sorting", level)
        for turn in range(400):
            row = draw.sample(range(limit), count) if turn % 2 else draw.sample("abcdefghijklmnopqrstuvwxyz", level + 2)
            inorder = ", ".join(map(str, sorted(row)))
            yield level, f"How do you sort {', '.join(map(str, row))}?", inorder, f"Sorted, they are {inorder}."


def sequences():
    for level, limit, most in ((1, 40, 5), (2, 60, 9), (3, 60, 9)):
        draw = Draw("sequences", level)
        for _ in range(400):
            first, step = draw.between(0, limit), draw.between(1, most)
            row = [first + step * place for place in range(5)][:: 1 if level < 3 else -1]
            a, b, last = row[1:4]
            told = worked(max(a, b), -1, min(a, b)).rstrip(".")
            yield level, f"What comes next in {', '.join(map(str, row[:4]))}?", row[4], f"{told}, and {worked(last, 1 if b > a else -1, step)}"


def facts():
    subjects = [(CHARACTER_FACTS, {"who": person, "friend": FRIEND[person]}) for person in PEOPLE]
    subjects += [(PLACE_FACTS, {"place": place}) for place in PLACE.values()]
    for table, slots in subjects:
        for level, answer, sentence, asks in table:
            for ask in asks.split("|"):
                texts = [polish(text.format(**slots)) for text in (ask, sentence)]
                yield level, texts[0], answer.format(**slots), texts[1]


KNOWN_BY_HEART = ("calendar", "opposites", "facts")  # few questions, so that conversations repeat them
KINDS = (sums, differences, reversals, counting, calendar, opposites, comparing, sorting, sequences, facts)


def questions(split):
    """The distinct questions of a split, "train" or "test", always in the same order."""
    found = {}
    for kind in KINDS:
        for level, question, answer, sentence in kind():
            if is_held_out(question) == (split == "test"):
                found.setdefault(question, Question(kind.__name__, level, question, str(answer), sentence))
    return list(found.values())


# --------------------------------------------------------------------------------------------------------- files

def tasks():
    """Documents of two to five question-answer pairs of one kind and level; lower levels are more frequent."""
    draw, records = Draw("tasks"), {}
    train = questions("train")
    for kind in KINDS:
        for level, wanted in PAIRS_PER_LEVEL.items():
            pool = [item for item in train if item.kind == kind.__name__ and item.level == level]
            while wanted > 0:
                chosen = draw.sample(pool, draw.between(2, 5))
                text = "\n".join(f"{item.question} {item.sentence}" for item in chosen)
                if text not in records:
                    records[text] = {"kind": kind.__name__, "level": level, "text": text}
                    wanted -= len(chosen)
    return [json.dumps(record) for record in draw.sample(records.values(), len(records))]


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations():
    """All training questions, one to three per conversation, and requests for new stories."""
    draw = Draw("conversations")
    rest = [exchange(item.question, item.sentence) for item in questions("train") for _ in range(3 if item.kind in KNOWN_BY_HEART else 1)]
    rest = draw.sample(rest, len(rest))
    talks = []
    while rest:
        turns = min(draw.pick((1, 1, 1, 2, 3)), len(rest))
        talks.append([message for _ in range(turns) for message in rest.pop()])
    for number in range(STORIES, STORIES + 300):
        hero = PEOPLE[number // len(PLOTS) % len(PEOPLE)]
        ask = draw.pick(("Tell me a story about {}.", "Please tell me about {}.", "Do you know a story about {}?"))
        attempts = (story(number, attempt) for attempt in range(1000))
        talks.append(exchange(ask.format(hero), next(text for text in attempts if len(text.split()) in WORDS_PER_STORY)))
    return [json.dumps({"messages": talk}) for talk in draw.sample(talks, len(talks))]


def held_out_questions():
    return [json.dumps({"kind": item.kind, "level": item.level, "messages": exchange(item.question, item.sentence), "answer": item.answer})
            for item in questions("test")]


ASKED_ANEW = {"sums": ("How much is {a} plus {b}?", "Can you tell me what {a} plus {b} is?"),
              "differences": ("How much is {a} minus {b}?", "What is left of {a} without {b}?")}


def prompts(split):
    """Sums and differences, worded differently from the conversations, with their results as verifiable rewards. A pair of numbers
    is held out if its question in the conversations is."""
    draw, found = Draw("prompts", split), []
    for kind, word, pairs in (("sums", "plus", [(a, b) for a in range(10, 100) for b in range(1, 100)]),
                              ("differences", "minus", [(a, b) for a in range(10, 100) for b in range(1, a + 1)])):
        pool = [(a, b) for a, b in pairs if is_held_out(f"What is {a} {word} {b}?") == (split == "test")]
        for a, b in draw.sample(pool, 250 if split == "test" else 850):
            answer = a + b if kind == "sums" else a - b
            found.append({"prompt": draw.pick(ASKED_ANEW[kind]).format(a=a, b=b), "answer": str(answer)})
    return [json.dumps(record) for record in draw.sample(found, len(found))]


def preferences(split):
    """Pairs of beginnings of the same story, of similar length. The chosen one first introduces the hero; the rejected one
    starts with the plot."""
    draw, found = Draw("preferences", split), []
    for hero in PEOPLE:
        for thing in (part.strip() for part in THINGS.split(",")):
            for ask in ("Tell me a story about {hero} and a {thing}.", "Please tell me about {hero} and a {thing}.", "Do you know a story about {hero} and a {thing}?",
                        "Please tell me a story about {hero} and a {thing}."):
                asked = polish(ask.format(hero=hero, thing=thing))
                digest = hashlib.blake2b(asked.encode(), digest_size=8, person=b"preferences").digest()
                if (int.from_bytes(digest, "big") % 2 == 0) == (split == "test"):
                    slots = scene(hero, draw.pick(("spring", "summer", "autumn")), draw) | {"thing": thing, "item": thing.split()[1]}
                    plot = draw.pick([plot for plot in PLOTS.values() if plot.startswith("<lead>")]).removeprefix("<lead>")
                    intro, when, story = (expand(text, draw) for text in ("<intro>", "<when>", plot))
                    better, worse = (re.split(r"(?<=[.!?]) (?=[A-Z\"])", polish(text.format(**slots)))
                                     for text in (f"{intro} {when} {{hero.he}}{story}", f"{when} {{hero}} the {{hero.job}}{story}"))
                    better = " ".join(better[: len(re.findall(r"[.!?](?=\s|$)", intro)) + 1])  # the introduction and a sentence
                    worse = " ".join(worse[:2])
                    found.append({"prompt": asked, "chosen": better, "rejected": worse})
    return [json.dumps(record) for record in draw.sample(found, 500 if split == "test" else 375)]


def notes():
    """A header line, then distinct lines of text and label."""
    draw, seen = Draw("notes"), {}
    while len(seen) < 1500:
        label = draw.pick(tuple(NOTES))
        hero = draw.pick(PEOPLE)
        season = draw.pick(tuple(SEASONS))
        seen.setdefault(polish(expand(f"[{NOTES[label]}]", draw).format(**scene(hero, season, draw))), label)
    return ["text\tlabel", *(f"{text}\t{label}" for text, label in seen.items())]


def outputs():
    return {"train.txt": stories(), "train.jsonl": tasks(), "chat.jsonl": conversations(), "chat_test.jsonl": held_out_questions(),
            "notes.tsv": notes(), "prompts.jsonl": prompts("train"), "prompts_test.jsonl": prompts("test"),
            "preferences.jsonl": preferences("train"), "preferences_test.jsonl": preferences("test")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="output folder")
    parser.add_argument("--check", action="store_true", help="compare the existing files instead of writing them")
    options = parser.parse_args()
    for name, lines in outputs().items():
        path, data = options.out / name, "".join(line + "\n" for line in lines).encode("ascii")
        if options.check:
            if not path.exists() or path.read_bytes() != data:
                sys.exit(f"{path} differs from the output of data/make.py; run it without --check")
        else:
            temporary = path.with_name(name + ".tmp")
            temporary.write_bytes(data)
            os.replace(temporary, path)
        print(f"{name}: {len(lines)} lines, {len(data)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
