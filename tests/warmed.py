"""Imported to have everything imported and traced that a prune of the tiny Llama needs."""

import surgeon
from tests import models, remembered

KEPT = remembered.captures()
KEPT.__enter__()  # for as long as the process lives
surgeon.prune(models.tiny("Llama"), ratio=0.2, verify=False).emission  # noqa: B018
