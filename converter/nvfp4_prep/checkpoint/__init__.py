"""Reading of any Hugging Face checkpoint by byte ranges: files, headers, index."""
