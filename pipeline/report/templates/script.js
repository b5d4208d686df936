// Everything is there without this: it filters tables, and shows pictures in full.
for (const label of document.querySelectorAll(".filter")) {
  const [input, told] = label.querySelectorAll("input, output");
  const rows = label.nextElementSibling.querySelectorAll("tbody tr");
  label.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    told.textContent = [...rows].filter(row => !row.hidden).length + " of " + rows.length;
  });
}
for (const button of document.querySelectorAll("figure button")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.parentElement.classList.toggle("full"));
  });
}
