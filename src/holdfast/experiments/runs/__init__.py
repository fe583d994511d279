"""One run: trained, evaluated, analysed, and kept in a folder."""
