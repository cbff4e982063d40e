"""A run as one self-contained HTML page, and the facts about it that `jepa status` shows too."""
