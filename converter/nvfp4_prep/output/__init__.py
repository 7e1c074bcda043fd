"""The directory that a command writes: lock, journal, atomic files, parts; for restore and relayout as for convert."""
