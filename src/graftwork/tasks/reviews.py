"""Reviews with sentiment labels: folders of texts in the IMDb layout, and Amazon's tab-separated files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.readers import shorten
from graftwork.errors import DataError
from graftwork.tasks.lookup import FilesOrHub
from graftwork.tasks.sources import HubSource, Record, Records, read_lines, read_tsv

_FOLDERS = ("aclImdb", "imdb", "movie_reviews", "")
_LABELS = {"neg": 0, "pos": 1, "unsup": -1}

_NAMES = (
    "Wireless",
    "Watches",
    "Video_Games",
    "Video_DVD",
    "Video",
    "Toys",
    "Tools",
    "Sports",
    "Software",
    "Shoes",
    "Pet_Products",
    "Personal_Care_Appliances",
    "PC",
    "Outdoors",
    "Office_Products",
    "Musical_Instruments",
    "Music",
    "Mobile_Electronics",
    "Mobile_Apps",
    "Major_Appliances",
    "Luggage",
    "Lawn_and_Garden",
    "Kitchen",
    "Jewelry",
    "Home_Improvement",
    "Home_Entertainment",
    "Home",
    "Health_Personal_Care",
    "Grocery",
    "Gift_Card",
    "Furniture",
    "Electronics",
    "Digital_Video_Games",
    "Digital_Video_Download",
    "Digital_Software",
    "Digital_Music_Purchase",
    "Digital_Ebook_Purchase",
    "Camera",
    "Books",
    "Beauty",
    "Baby",
    "Automotive",
    "Apparel",
)

AMAZON_CATEGORIES: Sequence[str] = (
    *(f"{name}_v1_00" for name in _NAMES),
    "Digital_Ebook_Purchase_v1_01",
    "Books_v1_01",
    "Books_v1_02",
)
"""Categories of the US corpus, as they occur in its file names."""


@dataclass(frozen=True, slots=True)
class ReviewFolders:
    """Reader of `<split>/pos/*.txt` and `<split>/neg/*.txt`, one review per file.

    A folder with `pos` and `neg` but without split folders is used as a test set only, because it does not define a
    training split.
    """

    folders: tuple[str, ...] = _FOLDERS

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into the fields `text` and `label`, 0 for negative and 1 for positive.

        Raises:
            DataError: If no folder with both classes exists.
        """
        places = [data / folder / split for folder in self.folders if folder] + [data / split]
        if split == "test":
            places += [data / folder for folder in self.folders]
        for place in places:
            if all((place / name).is_dir() for name in ("pos", "neg")):
                return _read_folder(place, split)
        raise DataError(
            f"Found no reviews of {split} in {data}; expected folders pos and neg in one of: "
            f"{', '.join(map(str, places))}. Name the folder that holds them, or another split."
        )


def _read_folder(place: Path, split: str) -> Records:
    rows: list[Record] = []
    for name, label in _LABELS.items():
        for path in sorted((place / name).glob("*.txt")) if (place / name).is_dir() else ():
            rows.append(Record(str(len(rows)), {"text": "\n".join(read_lines(path)), "label": label}))
    return Records("reviews", split, tuple(rows), len(rows), 0, place)


@dataclass(frozen=True, slots=True)
class AmazonFile:
    """Reader of `amazon_reviews_us_<category>.tsv` without quoting; the first tenth is the validation split."""

    category: str

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into the fields `review_headline`, `review_body` and `star_rating`.

        Raises:
            DataError: If the file or a column is missing, or a rating is not a number.
        """
        name = f"amazon_reviews_us_{self.category}.tsv"
        places = [data / "amazon_reviews" / name, data / name]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise DataError(
                f"Found no {name} in {data}; expected one of: {', '.join(map(str, places))}. The public copies were "
                "withdrawn; provide the unpacked file, or use --data hub for the Amazon polarity reviews."
            )
        table = read_tsv(path)
        rows = [Record(str(index), _amazon_fields(cells, path, index)) for index, cells in table.rows]
        cut = len(rows) // 10
        chosen = rows[:cut] if split == "validation" else rows[cut:]
        return Records(f"amazon_reviews/{self.category}", split, tuple(chosen), len(chosen), table.ignored, path)


def _amazon_fields(cells: Mapping[str, str], path: Path, index: int) -> dict[str, Any]:
    try:
        rating = int(cells["star_rating"])
        if not 1 <= rating <= 5:
            raise ValueError
        return {
            "review_headline": cells["review_headline"],
            "review_body": cells["review_body"],
            "star_rating": rating,
        }
    except KeyError as error:
        raise DataError(
            f"{path}, line 1: found the columns {', '.join(cells)}; expected also {error.args[0]}. "
            "Check that this is the original file."
        ) from None
    except ValueError:
        raise DataError(
            f"{path}, line {index + 2}: found star_rating {shorten(cells['star_rating'])}; expected 1 to 5. Fix "
            "the line."
        ) from None


def _polarity_fields(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "review_headline": row["title"],
        "review_body": row["content"],
        "star_rating": 5 if row["label"] else 1,
    }


IMDB = FilesOrHub(ReviewFolders(), HubSource("stanfordnlp/imdb"))
"""IMDb from folders or the hub."""


def amazon(category: str) -> FilesOrHub:
    """Return the source of one category of the US corpus; the hub has the polarity reviews for all categories."""
    hub = HubSource("fancyzhx/amazon_polarity", splits={"validation": "test"})
    return FilesOrHub(AmazonFile(category), hub, _polarity_fields)
