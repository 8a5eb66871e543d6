"""The words of the made-up bookshop: sixteen genres, three shelves each, and how their titles are built."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shelf:
    """One shelf: its label, a blurb, and the words and patterns of its titles.

    A pattern may use {adj}, {noun} and {name}; `series` patterns name a series. series_share: the chance that
    a new title begins one.
    """

    label: str
    blurb: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    names: tuple[str, ...]
    patterns: tuple[str, ...]
    series: tuple[str, ...]
    series_share: float


_STORY = (
    "The {adj} {noun}",
    "The {noun} of {name}",
    "The {noun} from {name}",
    "The Last {adj} {noun}",
    "Farewell, {name}",
)
_CASE = (
    "The {adj} {noun}",
    "The Secret of the {noun}",
    "The {noun} on {name} Street",
    "Death of the {adj} {noun}",
)
_GUIDE = (
    "{adj} {noun}",
    "The {adj} {noun} Handbook",
    "{noun}: {adj} Lessons with {name}",
    "A Year of {adj} {noun}",
    "{name}'s {adj} {noun}",
)


def _story(label: str, blurb: str, adjectives: str, nouns: str, names: str, series: str) -> Shelf:
    return _shelf(label, blurb, adjectives, nouns, names, _STORY, series, 0.5)


def _case(label: str, blurb: str, adjectives: str, nouns: str, names: str, series: str) -> Shelf:
    return _shelf(label, blurb, adjectives, nouns, names, _CASE, series, 0.5)


def _guide(label: str, blurb: str, adjectives: str, nouns: str, names: str, series: str) -> Shelf:
    return _shelf(label, blurb, adjectives, nouns, names, _GUIDE, series, 0.3)


def _shelf(
    label: str,
    blurb: str,
    adjectives: str,
    nouns: str,
    names: str,
    patterns: tuple[str, ...],
    series: str,
    series_share: float,
) -> Shelf:
    def split(words: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in words.split(","))

    return Shelf(label, blurb, split(adjectives), split(nouns), split(names), patterns, split(series), series_share)


GENRES: dict[str, tuple[Shelf, ...]] = {
    "Fantasy": (
        _story(
            "Epic Fantasy",
            "Kingdoms at war, an old oath, and a sword that remembers.",
            "Broken, Gilded, Ashen, Thorned, Winter, Nameless, Ember",
            "Crown, Throne, Oath, Sword, Dragon, Kingdom, Warden, Banner",
            "Eldermoor, Karrowen, Ysmere, Dunhallow, Varrenfall",
            "The {name} Saga, Chronicles of {name}, Heirs of {name}",
        ),
        _story(
            "Urban Fantasy",
            "Magic behind the night bus, and rent still due on Friday.",
            "Midnight, Neon, Crooked, Borrowed, Rain-Soaked, Secondhand",
            "Spell, Witch, Familiar, Hex, Alley, Warlock, Curse, Goblin",
            "Soho, Brixton, Harbour Lane, Canal Street, Platform Nine",
            "The {name} Coven, {name} After Dark, Hexes of {name}",
        ),
        _story(
            "Fairy-Tale Retellings",
            "The story you know, told by the one who was left out.",
            "Glass, Briar, Moonlit, Sleeping, Woven, Silver",
            "Rose, Spindle, Slipper, Wolf, Mirror, Huntsman, Tower, Swan",
            "the Beast, the Stepsister, the Seventh Daughter, Briarwood, the Goose Girl",
            "Tales from {name}, Once Upon {name}, The {noun} Retold",
        ),
    ),
    "Science Fiction": (
        _story(
            "Space Opera",
            "One battered ship, nine crew, and the far end of the galaxy.",
            "Distant, Burning, Silent, Stellar, Drifting, Orbital",
            "Star, Fleet, Starship, Nebula, Colony, Empire, Beacon, Frontier",
            "Andara, Cygnus Gate, Tau Nine, Orrin's Reach, the Outer Belt",
            "The {name} Fleet, Beyond {name}, The {name} Cycle",
        ),
        _story(
            "Cyberpunk",
            "Chrome, code and a debt that will not stay deleted.",
            "Chrome, Wired, Synthetic, Burned-Out, Static, Electric",
            "Circuit, Hacker, Ghost, Signal, Implant, Network, Cipher, Android",
            "Neo Osaka, Sector Twelve, Gridtown, Low Shanghai, the Undernet",
            "{name} Protocol, Runners of {name}, The {name} Files",
        ),
        _story(
            "Time Travel",
            "She has eleven minutes to put back what she changed.",
            "Borrowed, Backward, Missing, Yesterday's, Endless, Looping",
            "Hour, Clock, Paradox, Century, Minute, Timeline, Tomorrow, Calendar",
            "Tuesday, the Clockmaker, 1897, the Watch Room, Greenwich",
            "The {name} Paradox, Agents of {name}, The {name} Loop",
        ),
    ),
    "Mystery": (
        _case(
            "Cosy Mystery",
            "A village, a body, and a baker who notices crumbs.",
            "Buttered, Knitted, Floral, Teatime, Poisoned, Village",
            "Bakery, Teapot, Vicarage, Flower Show, Bookshop, Cat Café, Scone, Garden Party",
            "Primrose, Maple, Chapel, Honeypot, Duckpond",
            "A Bakewell Village Mystery, The Primrose Lane Mysteries, A Tabby and Tea Mystery",
        ),
        _case(
            "Police Procedural",
            "The file was closed in 1989. The inspector opens it again.",
            "Cold, Silent, Buried, Second, Unnamed, Missing",
            "Witness, Precinct, Evidence Room, Suspect, Harbour, Detective, Case, Alibi",
            "Canal, Station, Quarry, Dockside, Granite",
            "Inspector Halloran, Detective Sato Investigates, The Cold Case Unit",
        ),
        _case(
            "Noir",
            "Rain on the window, a client with a lie, and a bill unpaid.",
            "Crooked, Smoky, Bitter, Bluffing, Lonesome, Double-Crossed",
            "Gumshoe, Nightclub, Gambler, Racetrack, Blonde, Hotel Bar, Grifter, Alley",
            "Flint, Sunset, Bourbon, Eleventh, Mercer",
            "A Jack Marlow Thriller, The Rita Vance Papers, Private Eye Delaney",
        ),
    ),
    "Romance": (
        _story(
            "Small-Town Romance",
            "He came back to sell the farm. She runs the bakery next door.",
            "Sweet, Sunlit, Maple, Second-Chance, Cosy, Honey",
            "Bakery, Kiss, Porch, Farmhouse, Wedding, Sweetheart, Promise, Orchard",
            "Willow Creek, Cedar Falls, Juniper Bay, Maple Hollow, Pine Ridge",
            "Hearts of {name}, A {name} Romance, Love in {name}",
        ),
        _story(
            "Regency Romance",
            "A ballroom, a scandal, and a duke who cannot dance.",
            "Reluctant, Scandalous, Improper, Masked, Wicked, Proper",
            "Duke, Duchess, Ball, Viscount, Governess, Heiress, Waltz, Rake",
            "Mayfair, Lady Ashby, Lord Pemberley-Hume, Bath, Hartwell Hall",
            "The {name} Scandals, Seasons of {name}, The Rakes of {name}",
        ),
        _story(
            "Office Romance",
            "Two rivals, one promotion, and a broken lift.",
            "Fake, Overtime, Unprofessional, Corner-Office, Coffee-Break, Overbooked",
            "Boss, Deadline, Meeting, Intern, Rival, Promotion, Elevator, Proposal",
            "the Fourth Floor, Accounting, Manhattan, Monday, Human Resources",
            "Love on {name}, The {name} Affair, Strictly {name}",
        ),
    ),
    "Horror": (
        _story(
            "Haunted Houses",
            "The house was cheap. The cellar door was locked from within.",
            "Creaking, Hollow, Whispering, Boarded-Up, Candlelit, Sunken",
            "House, Cellar, Attic, Staircase, Nursery, Ghost, Séance, Corridor",
            "Blackthorn Hall, Ravenscar, Number Thirteen, Widow's Hill, Gallows End",
            "The {name} Hauntings, Ghosts of {name}, Return to {name}",
        ),
        _story(
            "Monster Horror",
            "Something under the ice has learned to knock.",
            "Hungry, Crawling, Pale, Feral, Drowned, Toothed",
            "Beast, Vampire, Werewolf, Swarm, Claw, Ghoul, Fang, Lair",
            "Black Lake, Cutter's Swamp, the North Mine, Wolf Ridge, Salt Island",
            "The {name} Creature, Blood of {name}, The Beast of {name}",
        ),
        _story(
            "Folk Horror",
            "The harvest was good. The village says it is her turn.",
            "Straw, Bitter, Pagan, Antlered, Barren, Harvest",
            "Maypole, Scarecrow, Ritual, Standing Stone, Corn King, Effigy, Hollow, Sabbath",
            "Withy Fen, Crow Parish, Harrow Down, Old Mother Rook, Thornwick",
            "The {name} Rites, Harvest of {name}, The {name} Cult",
        ),
    ),
    "Historical Fiction": (
        _story(
            "Second World War Novels",
            "A codebook, a forged passport, and the last train to Lisbon.",
            "Secret, Paper, Wartime, Hidden, Forgotten, Blacked-Out",
            "Codebreaker, Letter, Radio, Resistance, Spitfire, Nurse, Violin, Courier",
            "Lisbon, Bletchley, Normandy, Warsaw, the Blitz",
            "The {name} Sisters, Wartime in {name}, The {name} Network",
        ),
        _story(
            "Ancient World Novels",
            "From the slave market to the Senate, with one borrowed name.",
            "Bronze, Marble, Imperial, Sacked, Laurelled, Sunburnt",
            "Legion, Gladiator, Centurion, Temple, Senator, Chariot, Oracle, Galley",
            "Rome, Carthage, Alexandria, Sparta, Pompeii",
            "Eagles of {name}, Sons of {name}, The {name} Legion",
        ),
        _story(
            "Tudor Novels",
            "At court a whisper is worth more than a sword.",
            "Royal, Beheaded, Velvet, Exiled, Painted, Courtly",
            "Queen, Lady-in-Waiting, Courtier, Heir, Portrait, Scaffold, Confessor, Consort",
            "Hampton Court, the Tower, Greenwich Palace, Whitehall, Calais",
            "The {name} Court, Queens of {name}, Intrigue at {name}",
        ),
    ),
    "Young Adult": (
        _story(
            "Dystopia",
            "On her sixteenth birthday every citizen is given a number.",
            "Numbered, Walled, Rebel, Ruined, Chosen, Forbidden",
            "Trial, Sector, Rebellion, Faction, Arena, Tribute, Wall, Uprising",
            "District Zero, the Dome, New Haven, Sector Six, the Outlands",
            "The {name} Trials, Escape from {name}, The {name} Rebellion",
        ),
        _story(
            "School Stories",
            "New school, wrong uniform, and a secret under the gym.",
            "Awkward, Popular, Detention, First-Year, Homesick, Sleepless",
            "Roommate, Crush, Locker, Prom, Dormitory, Exam, Team Captain, Yearbook",
            "Northgate High, St. Agatha's, Homeroom B, Lakeside Academy, the Debate Club",
            "The {name} Diaries, Tales of {name}, Class of {name}",
        ),
        _story(
            "Animal Adventures",
            "A lost dog, a clever crow, and three hundred miles of moor.",
            "Brave, Runaway, Little, Wandering, Clever, Snowbound",
            "Fox, Pony, Otter, Badger, Puppy, Owl, Hedgehog, Colt",
            "Bramble Wood, Hazel Farm, Otter Creek, Windmill Hill, Fern Valley",
            "The Animals of {name}, {name} Friends, Adventures at {name}",
        ),
    ),
    "Cooking": (
        _guide(
            "Bread Baking",
            "Flour, water, salt and time, explained for a home oven.",
            "Rustic, Slow-Rise, Everyday, Crusty, Wholegrain, No-Knead",
            "Sourdough, Bread, Baguettes, Rye Loaves, Focaccia, Starters",
            "Henrik, Nonna Pia, Claudette, The Village Baker, Old Tom",
            "{name} Bakes Bread, The Sourdough School, Flour & Water Lessons",
        ),
        _guide(
            "Vegetarian Cooking",
            "Weeknight plates from the market stall, no meat missed.",
            "Quick, Green, Seasonal, Hearty, One-Pot, Spiced",
            "Vegetables, Lentils, Salads, Curries, Tofu, Chickpea Suppers",
            "Meera, Anjali, The Market Cook, Yotam's Neighbour, Lucía",
            "{name} Cooks Green, The Meatless Kitchen, Plants on the Plate",
        ),
        _guide(
            "Desserts and Pastry",
            "Layers, glazes and the patience they need.",
            "Buttery, Decadent, Simple, French, Chocolate, Festive",
            "Cakes, Tarts, Macarons, Éclairs, Puddings, Cookies",
            "Madame Colette, Auntie Bea, Chef Laurent, The Pastry Girl, Dominique",
            "{name}'s Pâtisserie, The Sweet Kitchen, Sugar Lessons",
        ),
    ),
    "Gardening": (
        _guide(
            "Kitchen Gardens",
            "What to sow, when to pick, and how to keep the slugs away.",
            "Raised-Bed, Organic, Small-Plot, No-Dig, Heirloom, Backyard",
            "Tomatoes, Vegetable Gardens, Herbs, Compost, Potatoes, Beans",
            "Walter Greene, The Allotment Lady, Old MacLeod, Rosie Marsh, Farmer Joan",
            "The Allotment Year, {name} Grows Food, From Seed to Table",
        ),
        _guide(
            "Flower Gardens",
            "Borders that bloom from snowdrop to frost.",
            "Perennial, Wild, Cottage, Fragrant, Cut-Flower, Climbing",
            "Roses, Borders, Dahlias, Tulips, Meadows, Peonies",
            "Lady Fennimore, Gertrude Bloom, Iris Hartley, The Rose Man, Clematis Jones",
            "The Cottage Border, Blooms with {name}, The Flower Farm",
        ),
        _guide(
            "Houseplants",
            "Green corners for north windows and forgetful hands.",
            "Unkillable, Tropical, Low-Light, Potted, Trailing, Windowsill",
            "Houseplants, Ferns, Succulents, Orchids, Monsteras, Cacti",
            "The Plant Doctor, Fern Avery, Basil Potts, Uncle Cactus, Ivy Chen",
            "The Indoor Jungle, Potting with {name}, Leaf by Leaf",
        ),
    ),
    "Sports and Outdoors": (
        _guide(
            "Running",
            "From the first mile to the finish line, week by week.",
            "Barefoot, Marathon, Trail, Long-Distance, Injury-Free, Sunrise",
            "Running, Training Plans, Ultramarathons, Half-Marathons, Sprinting, Pacing",
            "Coach Okoro, Kip Rono, Milo Strider, Coach Dana, The Slow Runner",
            "Run with {name}, Miles Ahead, The Finish Line Plan",
        ),
        _guide(
            "Hiking",
            "Day walks and long trails, with maps and honest times.",
            "Alpine, Hut-to-Hut, Lightweight, Coastal, Wilderness, Weekend",
            "Hiking, Backpacking, Ridge Walks, Trails, Mountain Huts, Summits",
            "Ranger Bill, Heidi Amsler, The Pathfinder, Boots McGraw, Ansel Peak",
            "Trails with {name}, The Summit Guides, Boots & Maps",
        ),
        _guide(
            "Climbing",
            "Holds, knots and the calm to use them.",
            "Vertical, Beginner, Granite, Indoor, Big-Wall, Fearless",
            "Climbing, Bouldering, Rope Work, Belaying, Crack Climbing, Fingerboards",
            "Sasha Krag, Pitch Larsen, The Wall Rat, Lynn Carabiner, Tomás Roca",
            "On the Rope, Climb with {name}, The Chalk Notes",
        ),
    ),
    "Crafts": (
        _guide(
            "Knitting",
            "Patterns in plain words, from scarf to cable jumper.",
            "Cabled, Cosy, Nordic, Top-Down, Striped, Weekend",
            "Knits, Sweaters, Socks, Shawls, Mittens, Baby Blankets",
            "Granny Astrid, Woolly Meg, Birgit Lund, The Yarn Sisters, Purl Evans",
            "The Yarn Basket, Knit with {name}, Stitches & Tea",
        ),
        _guide(
            "Woodworking",
            "Sharp chisels, tight joints, and a bench you build yourself.",
            "Hand-Cut, Shaker, Weekend, Japanese, Solid-Oak, Simple",
            "Joinery, Workbenches, Dovetails, Cabinets, Chairs, Carving",
            "Grandpa Joe, Master Ito, Ned Planer, The Oak Sisters, Carver Dunn",
            "The Workshop Series, Sawdust with {name}, Bench & Chisel",
        ),
        _guide(
            "Sewing and Quilting",
            "Cut once, pin twice, and wear it on Sunday.",
            "Patchwork, Vintage, Hand-Stitched, Easy, Zero-Waste, Upcycled",
            "Quilts, Dresses, Tote Bags, Sewing, Embroidery, Alterations",
            "Aunt Calico, Thimble Rae, Hettie Hem, The Quilt Guild, Bobbin Price",
            "The Quilt Circle, Sew with {name}, Needle & Thread",
        ),
    ),
    "Science": (
        _guide(
            "Astronomy",
            "What hangs over your roof tonight, and how old its light is.",
            "Backyard, Binocular, Deep-Sky, Winter, Amateur, Starlit",
            "Astronomy, Telescopes, Constellations, Galaxies, Planets, Eclipses",
            "Dr. Vega, Professor Orion Tate, Luna Park, Halley Brooks, The Night Watcher",
            "The Night Sky Library, Stargazing with {name}, Eyes on the Heavens",
        ),
        _guide(
            "Nature and Wildlife",
            "Field notes for those who look up, down and under stones.",
            "Hidden, Woodland, Urban, Patient, Four-Season, Coastal",
            "Birds, Mushrooms, Butterflies, Owls, Bees, Tide Pools",
            "Wren Holloway, Robin Finch, The Hedge Naturalist, Ada Moss, Heron Blythe",
            "The Field Notes, Out with {name}, Wild Neighbours",
        ),
        _guide(
            "Mathematics and Puzzles",
            "Beautiful arguments that fit on a napkin.",
            "Curious, Infinite, Elegant, Prime, Impossible, Playful",
            "Numbers, Proofs, Puzzles, Geometry, Probability, Paradoxes",
            "Professor Pi, Ms. Euler, Gauss Junior, The Napkin Mathematician, Emmy North",
            "The Puzzle Shelf, Counting with {name}, Proofs for Pleasure",
        ),
    ),
    "History": (
        _guide(
            "Military History",
            "Maps, orders and letters from both sides of the line.",
            "Forgotten, Decisive, Naval, Frozen, Besieged, Desert",
            "Battles, Campaigns, Warships, Sieges, Generals, Regiments",
            "Colonel Hargreaves, Wellington, Nelson, Sergeant Boyle, Zhukov",
            "The Great Campaigns, War Room, Battles with {name}",
        ),
        _guide(
            "Ancient History",
            "Potsherds, inscriptions, and what the empire left out.",
            "Lost, Buried, Roman, Egyptian, Bronze-Age, Golden",
            "Empires, Pharaohs, Ruins, Aqueducts, Tombs, Emperors",
            "Herodotus, Dr. Amara Said, Livia, The Dig Team, Professor Stone",
            "The Lost Empires, Digging with {name}, The Ancient Shelf",
        ),
        _guide(
            "Maritime History",
            "Salt, scurvy and the price of pepper.",
            "Shipwrecked, Arctic, Pirate, Merchant, Uncharted, Storm-Bound",
            "Voyages, Lighthouses, Sailors, Whalers, Explorers, Sea Routes",
            "Captain Marlowe, Bosun Pike, Magellan, Admiral Finn, The Cabin Boy",
            "The Ship's Log, At Sea with {name}, Seven Seas Histories",
        ),
    ),
    "Business": (
        _guide(
            "Personal Finance",
            "Money habits that survive a bad month.",
            "Frugal, Debt-Free, Lazy, Early, Simple, Sensible",
            "Investing, Budgets, Savings, Retirement, Index Funds, Money",
            "Penny Wise, Mr. Ledger, Uncle Warren, Frugal Fran, The Accountant Next Door",
            "The Money Basics, Save with {name}, Pennies & Plans",
        ),
        _guide(
            "Startups",
            "From a kitchen table to the first hundred customers.",
            "Lean, Bootstrapped, Reckless, Profitable, Tiny, Scrappy",
            "Startups, Founders, Pitches, Products, Growth, Side Projects",
            "Max Venture, Founder Fay, The Garage Team, Priya Launch, Ellis Board",
            "The Founder's Shelf, Zero to Launch, Built by {name}",
        ),
        _guide(
            "Leadership",
            "How to run a team that would choose you again.",
            "Quiet, Honest, Calm, Courageous, Remote, First-Time",
            "Leadership, Managers, Teams, Feedback, Meetings, Delegation",
            "Coach Reyes, Chief Morgan, Hana Lead, The Good Boss, Director Cole",
            "The Manager's Year, Lead with {name}, Better Mondays",
        ),
    ),
    "Mind and Body": (
        _guide(
            "Yoga",
            "Twenty minutes on the mat, for bodies that sit all day.",
            "Gentle, Morning, Restorative, Chair, Flowing, Bedtime",
            "Yoga, Stretching, Sun Salutations, Balance, Breathing, Asanas",
            "Guru Devi, Lotus Lane, Maya Stillwater, Swami Tom, Anand Rao",
            "On the Mat, Breathe with {name}, The Yoga Weeks",
        ),
        _guide(
            "Meditation",
            "Sit down, notice, begin again.",
            "Mindful, Quiet, Ten-Minute, Everyday, Wandering, Kind",
            "Meditation, Stillness, Silence, Attention, Sleep, Compassion",
            "Brother Paul, Thay Linh, The Quiet Monk, Sister Clare, Zenji Moto",
            "The Quiet Hour, Sit with {name}, Notes from the Cushion",
        ),
        _guide(
            "Habits and Productivity",
            "Small rules that make large days.",
            "Atomic-Age, Tiny, Focused, Distraction-Free, Unhurried, Five-Minute",
            "Habits, Focus, To-Do Lists, Routines, Deep Work, Willpower",
            "Dr. Focus, Ben Checklist, Olive Planner, Professor Routine, Ms. Early",
            "The Better Habit, Plan with {name}, One Thing at a Time",
        ),
    ),
    "Travel and Places": (
        _guide(
            "Travel Writing",
            "One rucksack, no plan, and a very slow train.",
            "Slow, Solo, Overland, Barefoot, Accidental, Two-Wheeled",
            "Journeys, Trains, Islands, Deserts, Border Crossings, Road Trips",
            "Marco Pole, Isabel Wander, The Vagabond, Freya Compass, Nomad Neil",
            "The Long Road, Travels with {name}, Postcards Home",
        ),
        _guide(
            "City Guides",
            "Where the locals eat, and which museum to skip.",
            "Secret, Walkable, Midnight, Rooftop, Budget, Rainy-Day",
            "Paris, Tokyo, Lisbon, Istanbul, Mexico City, Berlin",
            "Lola Metro, The Local, Flâneur Fred, Taxi Tim, Concierge Kay",
            "The Pocket City, Streets with {name}, 48 Hours",
        ),
        _guide(
            "Photography",
            "Light first, then the lens, then the luck.",
            "Black-and-White, Natural-Light, Street, Golden-Hour, Analogue, Long-Exposure",
            "Photography, Portraits, Landscapes, Lenses, Composition, Darkrooms",
            "Ansel Grey, Flash Gordon-Lee, Vivian Shutter, Iris Focal, Robert Lens",
            "The Camera Bag, Shoot with {name}, Frame by Frame",
        ),
    ),
}
