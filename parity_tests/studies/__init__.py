"""One engine per question; nothing here prints."""
