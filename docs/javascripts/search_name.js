// The theme's search is a dialog without a name: screen readers get one here.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
