"""What every wrapped model offers by name: its sites, and where each of them is."""

from interp.models.places import PlaceMap
from interp.sites import Place, match


class Named:
    """A model whose activations have stable names; subclasses set ``_places``."""

    _places: PlaceMap

    def sites(self, pattern: str | None = None) -> list[str]:
        """Site names, in forward order.

        Args:
            pattern: a name or shell-style pattern such as ``"blocks.*.hook_resid_post"`` or
                ``"up.*.resnets.*.hook_branch"``. None: every site.

        Raises:
            UnknownNameError: nothing matches; the message lists the nearest names.
            SiteUnavailableError: all that matches are sites that this model cannot offer; the message says why.
        """
        return self._places.names() if pattern is None else match(pattern, self._places.names(), self._places.reasons)

    def place(self, site: str) -> Place:
        """Where a site is in this model: module path, side, axes.

        Raises:
            UnknownNameError, SiteUnavailableError: see `PlaceMap.place`.
        """
        return self._places.place(site)
