// What the page does by itself: sends what was pressed or dropped, shows what a neighbor painted.
window.retrodiff = {
  // Example prompts.
  chips(element, trigger) {
    element.addEventListener("click", (event) => {
      const chip = event.target.closest("[data-prompt]");
      if (chip) trigger("select", { prompt: chip.dataset.prompt });
    });
  },

  // Cards of neighbors: pin, drop, take back.
  cards(element, trigger) {
    element.addEventListener("click", (event) => {
      const button = event.target.closest("[data-act]");
      if (button) trigger("select", { act: button.dataset.act, row: Number(button.dataset.row ?? -1) });
    });
  },

  // The place for a picture: a file is chosen, dropped or pasted, and sent as it is.
  drop(element, trigger, props) {
    const send = (file) => {
      if (!file) return;
      if (file.size > props.limit) {
        const [has, most] = [file.size, props.limit].map((n) => (n / 1e6).toFixed(1));
        trigger("upload", { problem: `the picture has ${has} MB, more than ${most} MB: send a smaller one` });
        return;
      }
      const reader = new FileReader();
      reader.onload = () => trigger("upload", { data: reader.result });
      reader.onerror = () => trigger("upload", { problem: "the browser cannot read this file" });
      reader.readAsDataURL(file);
    };
    element.addEventListener("change", (event) => {
      send(event.target.files?.[0]);
      event.target.value = "";
    });
    element.addEventListener("click", (event) => {
      if (event.target.closest("[data-act=remove]")) trigger("upload", { data: "" });
    });
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
      element.addEventListener(kind, (event) => {
        event.preventDefault();
        element.classList.toggle("rd-over", kind === "dragenter" || kind === "dragover");
        if (kind === "drop") send(event.dataTransfer.files[0]);
      });
    }
    document.addEventListener("paste", (event) => send(event.clipboardData?.files?.[0]));
  },

  // Lights what a neighbor painted, in its own sample or, for a card above, in all samples.
  light(from) {
    for (const heat of document.querySelectorAll(".rd-heat.on")) heat.classList.remove("on");
    for (const lit of document.querySelectorAll(".rd-lit")) lit.classList.remove("rd-lit");
    const chosen = from?.closest?.("[data-lit]");
    if (!chosen) return;
    const sample = chosen.closest(".rd-sample");
    const side = chosen.closest("#rd-near-other") ? "#rd-made-other" : "#rd-made";
    const where = sample ?? document.querySelector(side);
    for (const by of where?.querySelectorAll(`[data-heat][data-lit="${chosen.dataset.lit}"]`) ?? []) {
      const heat = by.closest(".rd-sample").querySelector(".rd-heat");
      heat.src = by.dataset.heat;
      heat.classList.add("on");
      by.classList.add("rd-lit");
    }
  },
};
// Where neighbors and samples lie below the screen, as on a phone, whoever asks for pictures is taken there.
function follow() {
  const near = document.querySelector("#rd-near");
  if (document.querySelector("#rd-made").getBoundingClientRect().top > innerHeight - 200) near.scrollIntoView();
}
document.addEventListener("click", (event) => event.target.closest?.("#rd-sample, #rd-again, [data-prompt]") && follow());
document.addEventListener("keydown", (event) => event.key === "Enter" && event.target.closest?.("#rd-prompt") && follow());
for (const kind of ["pointerover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => window.retrodiff.light(event.target));
}
