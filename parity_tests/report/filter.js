// Hides the rows of the table after a filter that do not have its text, or that agree.
for (const filter of document.querySelectorAll(".filter")) {
  const rows = [...filter.nextElementSibling.querySelectorAll("tbody tr")];
  const text = filter.querySelector("[type=search]"), wrong = filter.querySelector("[type=checkbox]");
  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const found = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => found.includes(word)) || (wrong?.checked && !("wrong" in row.dataset));
      shown += !row.hidden;
    }
    filter.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  filter.addEventListener("input", show);
  filter.hidden = false;
  show();
}
