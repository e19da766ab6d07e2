"""What fields of a config may say about data, apart from the code that does it.

So a config can be made, and a step benchmarked or planned, where no library for data is installed.
"""

# What an example is made of, and the columns that hold it where no field map names another. A
# column of the first name of two holds a list, one of the second a single text.
COLUMNS = {
    "image": ("image",),
    "captions": ("captions", "caption"),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "instruction": ("instruction",),
    "output": ("outputs", "output"),
    "image_id": ("id",),
    "question_id": ("question_id",),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "domain": ("domain",),
}

# How an image becomes a square without augmentation, and the filters that encoders were trained on
# with their numbers in Pillow, which the processors of Hugging Face name them by.
RESIZES = ("squash", "shortest_edge")
INTERPOLATIONS = {"bicubic": 3, "bilinear": 2, "lanczos": 1}
