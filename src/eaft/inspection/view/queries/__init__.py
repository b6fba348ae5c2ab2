"""The questions that the page asks of an inspection, a module for each subject."""

from eaft.inspection.view.queries.about import AboutQueries
from eaft.inspection.view.queries.concordance import ConcordanceQueries
from eaft.inspection.view.queries.database import Database
from eaft.inspection.view.queries.examples import ExampleQueries
from eaft.inspection.view.queries.exports import Exports
from eaft.inspection.view.queries.gates import GateQueries
from eaft.inspection.view.queries.plane import PlaneQueries
from eaft.inspection.view.queries.tokens import TokenQueries
from eaft.inspection.view.tables import Tables


class Queries:
    """All questions about one inspection. Several threads may ask at once."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.database = Database(tables)
        self.about = AboutQueries(self.database)
        self.plane = PlaneQueries(self.database)
        self.gates = GateQueries(self.database, self.plane)
        self.examples = ExampleQueries(self.database)
        self.tokens = TokenQueries(self.database)
        self.concordance = ConcordanceQueries(self.database)
        self.exports = Exports(self.database)
