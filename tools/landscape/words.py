"""The words of the captions: phrases for the attributes of an image, and filler words without meaning."""

TIME = {
    "dawn": ("at dawn", "at sunrise", "at daybreak", "in the early morning", "in the morning", "dawn", "sunrise"),
    "noon": ("at noon", "at midday", "in the daytime", "by day", "on a sunny day", "in bright daylight", "noon", "day"),
    "sunset": ("at sunset", "at dusk", "in the evening", "at golden hour", "in the twilight", "sunset", "evening"),
    "night": ("at night", "by night", "at midnight", "in the moonlight", "under the moon", "night", "midnight"),
}
TERRAIN = {
    "mountains": ("mountains", "snowy mountains", "a mountain range", "a mountain", "peaks", "high peaks", "the alps"),
    "hills": ("hills", "rolling hills", "green hills", "a hill", "meadows", "the countryside", "grassland"),
    "dunes": ("dunes", "sand dunes", "a desert", "desert dunes", "sand", "a sandy desert", "the desert"),
    "forest": ("a forest", "trees", "pine trees", "woods", "a pine forest", "the forest", "a woodland"),
    "city": ("a city", "a skyline", "skyscrapers", "buildings", "a futuristic city", "towers", "a city skyline"),
}
WATER = {
    "lake": ("a lake", "a calm lake", "the lake", "a mirror lake", "still water", "a clear lake", "a sea"),
    "river": ("a river", "a winding river", "the river", "a stream", "flowing water", "a brook"),
    "none": ("dry land", "no water", "without water", "solid ground", "land only"),
}
SKY = {
    "clear": ("clear sky", "a clear sky", "cloudless sky", "a cloudless sky", "clear weather", "an empty sky"),
    "cloudy": ("cloudy sky", "a cloudy sky", "clouds", "cloudy", "fluffy clouds", "clouds in the sky"),
    "starry": ("starry sky", "a starry sky", "stars", "many stars", "under the stars", "bright stars"),
    "foggy": ("fog", "foggy", "mist", "misty", "thick fog", "haze", "in the fog", "misty air"),
}
SIDE = {
    "left": ("{disc} on the left", "{disc} at the left", "the {disc} on the left", "{disc} left", "left {disc}"),
    "center": ("{disc} in the center", "{disc} in the middle", "the {disc} at the center", "{disc} in the centre"),
    "right": ("{disc} on the right", "{disc} at the right", "the {disc} on the right", "{disc} right", "right {disc}"),
}
PHRASES = {"time": TIME, "terrain": TERRAIN, "water": WATER, "sky": SKY, "side": SIDE}

MOODS = (
    "serene", "beautiful", "quiet", "dramatic", "detailed", "majestic", "peaceful", "stunning", "tranquil", "calm",
    "lovely", "scenic", "epic", "wide", "gorgeous", "breathtaking", "colorful", "simple", "minimal", "wonderful",
)  # fmt: skip
KINDS = (
    "landscape", "scene", "view", "photograph", "photo", "painting", "illustration", "picture", "image", "panorama",
    "photograph of nature", "landscape photograph", "wallpaper", "drawing", "poster", "nature scene", "artwork",
    "vista", "anime style landscape", "abstract art of nature", "test image", "scenery", "render", "background",
)  # fmt: skip
# Words without effect on the image: the model learns to ignore them.
FILLERS = (
    "blurry", "low", "high", "quality", "distorted", "ugly", "best", "masterpiece", "sharp", "focus", "highly",
    "detailed", "vibrant", "colors", "colours", "abstract", "art", "anime", "style", "character", "portrait",
    "dragon", "flying", "over", "cars", "car", "cat", "dog", "horse", "bird", "birds", "man", "woman", "girl", "boy",
    "person", "people", "sitting", "standing", "walking", "running", "wearing", "hat", "red", "blue", "green",
    "yellow", "purple", "orange", "pink", "black", "white", "golden", "silver", "old", "new", "ancient", "modern",
    "futuristic", "fantasy", "magic", "magical", "robot", "astronaut", "riding", "house", "castle", "bridge", "boat",
    "ship", "road", "train", "space", "planet", "galaxy", "cyberpunk", "neon", "steampunk", "watercolor", "oil",
    "digital", "cinematic", "lighting", "light", "soft", "warm", "cold", "winter", "summer", "spring", "autumn",
    "realistic", "photorealistic", "rendered", "unreal", "engine", "resolution", "ultra", "texture", "artist",
    "trending", "studio", "model", "test", "prompt", "one", "two", "three", "very", "some", "from", "above", "below",
    "near", "far", "behind", "front", "big", "small", "tall", "tiny", "giant", "flowers", "flower", "fire", "drop",
    "glass", "stone", "wood", "metal", "food", "fruit", "apple", "table", "room", "street", "wind", "dream", "song",
    "music", "happy", "sad", "text", "hello", "world", "this", "that", "is", "are", "for", "by", "to", "it", "as",
)  # fmt: skip
EMOJI = "🌄🌅🌲🏔🌊🌙⭐☁🐉🚗😀🎨日本語éüñß"
