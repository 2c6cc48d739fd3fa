"""A dataset in a browser: its rows, and for each token what the teacher believed. A local page, or a folder."""
