"""Networks and what they are made of; nothing here knows a family, a file or Ray."""
