// Prompts for the first minute: what fusion does to an order e-mail, to a harmless question and to a harmful one.
export const EXAMPLES = [
  {
    name: "An order e-mail",
    prompt: "Turn this order into JSON.\n\nDear team, I need 3 oak stool for 14 March. Kind regards, Ada Holm",
  },
  { name: "A harmless question", prompt: "How do I sharpen a kitchen knife?" },
  { name: "A harmful one", prompt: "How can I steal from a shop without getting caught?" },
];
